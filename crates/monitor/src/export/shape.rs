//! What the schema says of `block-export-add`. A test compares it with what is read.

use super::{Placement, Transport};
use crate::commands::shape::{BOOL, Definition, INT, MemberShape, STR, Shape};
use crate::commands::{ExportType, Kind};

/// `BlockExportOptions`.
pub(crate) fn shape() -> Shape {
    Shape::Named("BlockExportOptions", || Definition::Object {
        members: common(),
        variants: Some((
            "type",
            vec![(
                "fuse",
                Shape::Named("BlockExportOptionsFuse", || Definition::object(fuse())),
            )],
        )),
    })
}

fn common() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::required("type", ExportType::shape()),
        M::required("id", STR),
        M::optional("fixed-iothread", BOOL),
        M::optional("iothread", one_or_several("BlockExportIothreads")),
        M::required("node-name", STR),
        M::optional("writable", BOOL),
        M::optional("threads", INT),
    ]
}

fn fuse() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::required("mountpoint", STR),
        M::optional("growable", BOOL),
        M::optional("allow-other", on_off_auto("FuseExportAllowOther")),
        M::optional("max-background", INT),
        M::optional(
            "transport",
            Shape::Named("FuseExportTransport", || {
                Definition::Enum(Transport::WORDS.iter().map(|(word, _)| *word).collect())
            }),
        ),
        M::optional("depth", INT),
        M::optional("max-payload", INT),
        M::optional(
            "placement",
            Shape::Named("FuseExportPlacement", || {
                Definition::Enum(Placement::words().collect())
            }),
        ),
        M::optional("cpus", one_or_several("FuseExportCpus")),
        M::optional("passthrough", on_off_auto("OnOffAuto")),
    ]
}

fn one_or_several(name: &'static str) -> Shape {
    Shape::Named(name, || {
        Definition::Alternate(vec![STR, Shape::Array(Box::new(STR))])
    })
}

fn on_off_auto(name: &'static str) -> Shape {
    Shape::Named(name, || Definition::Enum(vec!["auto", "on", "off"]))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;
    use crate::ExportOptions;
    use crate::blockdev::shape_tests::all;
    use crate::fields::recorded;

    #[test]
    fn exports_are_told_with_exactly_the_members_that_are_read() {
        let mut arguments = all(&common());
        arguments.extend(all(&fuse()));
        // What cannot be given together.
        arguments.remove("threads");
        arguments.remove("cpus");
        arguments.insert("iothread".to_owned(), json!(["a", "b"]));
        let (outcome, asked) = recorded(|| ExportOptions::from_json(arguments));
        assert!(outcome.is_ok(), "{outcome:?}");
        let told = common().into_iter().chain(fuse());
        let told: BTreeSet<String> = told.map(|member| member.name.to_owned()).collect();
        let asked: BTreeSet<String> = asked.into_iter().collect();
        assert_eq!(asked, told);
    }
}
