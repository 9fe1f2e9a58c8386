//! What the schema says of `object-add`. A test compares it with what is read.

use super::ObjectOptions;
use crate::commands::shape::{Definition, INT, MemberShape, STR, Shape};

/// `ObjectOptions`.
pub(crate) fn shape() -> Shape {
    Shape::Named("ObjectOptions", || Definition::Object {
        members: common(),
        variants: Some((
            "qom-type",
            ObjectOptions::types()
                .iter()
                .filter_map(|name| Some((*name, of_type(name)?)))
                .collect(),
        )),
    })
}

fn common() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::required(
            "qom-type",
            Shape::Named("ObjectType", || {
                Definition::Enum(ObjectOptions::types().to_vec())
            }),
        ),
        M::required("id", STR),
    ]
}

/// What only this type has; `None` if nothing is known of it here.
fn of_type(name: &str) -> Option<Shape> {
    Some(match name {
        "iothread" => Shape::Named("IothreadProperties", || Definition::object(iothread())),
        "throttle-group" => Shape::Named("ThrottleGroupProperties", || {
            Definition::object(throttle_group())
        }),
        "secret" => Shape::Named("SecretProperties", || Definition::object(secret())),
        _ => return None,
    })
}

fn iothread() -> Vec<MemberShape> {
    ["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"]
        .into_iter()
        .map(|name| MemberShape::optional(name, INT))
        .collect()
}

/// The limits, without what their names begin with in `x-iops-total`.
const LIMITS: &[(&str, &str)] = &[
    ("iops-total", "x-iops-total"),
    ("iops-total-max", "x-iops-total-max"),
    ("iops-total-max-length", "x-iops-total-max-length"),
    ("iops-read", "x-iops-read"),
    ("iops-read-max", "x-iops-read-max"),
    ("iops-read-max-length", "x-iops-read-max-length"),
    ("iops-write", "x-iops-write"),
    ("iops-write-max", "x-iops-write-max"),
    ("iops-write-max-length", "x-iops-write-max-length"),
    ("bps-total", "x-bps-total"),
    ("bps-total-max", "x-bps-total-max"),
    ("bps-total-max-length", "x-bps-total-max-length"),
    ("bps-read", "x-bps-read"),
    ("bps-read-max", "x-bps-read-max"),
    ("bps-read-max-length", "x-bps-read-max-length"),
    ("bps-write", "x-bps-write"),
    ("bps-write-max", "x-bps-write-max"),
    ("bps-write-max-length", "x-bps-write-max-length"),
    ("iops-size", "x-iops-size"),
];

fn throttle_group() -> Vec<MemberShape> {
    let limits = MemberShape::optional(
        "limits",
        Shape::Named("ThrottleLimits", || {
            let members = LIMITS.iter();
            Definition::object(
                members
                    .map(|(name, _)| MemberShape::optional(name, INT))
                    .collect(),
            )
        }),
    );
    let old = LIMITS
        .iter()
        .map(|(_, name)| MemberShape::optional(name, INT));
    std::iter::once(limits).chain(old).collect()
}

fn secret() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::optional("data", STR),
        M::optional("file", STR),
        M::optional(
            "format",
            Shape::Named("QCryptoSecretFormat", || {
                Definition::Enum(vec!["raw", "base64"])
            }),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;
    use crate::blockdev::shape_tests::all;
    use crate::fields::recorded;

    #[test]
    fn iothreads_are_told_with_exactly_the_members_that_are_read() {
        let mut arguments = all(&common());
        arguments.extend(all(&iothread()));
        arguments.insert("qom-type".to_owned(), json!("iothread"));
        let (outcome, asked) = recorded(|| ObjectOptions::from_json(arguments));
        assert!(outcome.is_ok(), "{outcome:?}");
        let told = common().into_iter().chain(iothread());
        let told: BTreeSet<String> = told.map(|member| member.name.to_owned()).collect();
        assert_eq!(asked.into_iter().collect::<BTreeSet<_>>(), told);
    }

    #[test]
    fn every_type_is_told_of() {
        for name in ObjectOptions::types() {
            assert!(of_type(name).is_some(), "{name}");
        }
    }
}
