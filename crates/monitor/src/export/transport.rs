//! What an export says of the way between the kernel and its threads; none of it is known to QEMU.

use std::num::NonZeroU16;

use crate::error::Error;
use crate::fields::{Fields, OnOffAuto};

/// How requests come and answers go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportOptions {
    /// `transport`: through `/dev/fuse`, or by FUSE over io_uring. Default: auto.
    pub transport: Transport,
    /// `depth`: requests that each CPU's queue hands out at once (uring only). Default: the export chooses.
    pub depth: Option<NonZeroU16>,
    /// `max-payload`: the largest request, in bytes. Default: the export chooses.
    pub max_payload: Option<u32>,
    /// `placement` or `cpus`: where the threads run. Default: auto.
    pub placement: Placement,
    /// `passthrough`: whether the kernel may read and write the image file itself. Default: off.
    pub passthrough: OnOffAuto,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self {
            transport: Transport::Auto,
            depth: None,
            max_payload: None,
            placement: Placement::Auto,
            passthrough: OnOffAuto::Off,
        }
    }
}

/// Which way requests come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transport {
    /// FUSE over io_uring where it can be had.
    #[default]
    Auto,
    /// `/dev/fuse`.
    Device,
    /// FUSE over io_uring, or fail.
    Uring,
}

impl Transport {
    /// How they are written.
    pub const WORDS: &[(&str, Self)] = &[
        ("auto", Self::Auto),
        ("device", Self::Device),
        ("uring", Self::Uring),
    ];
}

/// Where the threads of an export run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Placement {
    /// What serves most requests.
    #[default]
    Auto,
    /// Wherever the scheduler puts them.
    Free,
    /// Each on the CPUs whose requests it serves.
    Pinned,
    /// Each on others than those.
    Spread,
    /// `cpus`: one thread after the other on these.
    Cpus(Vec<u16>),
}

/// The placements that have a name.
const PLACEMENTS: &[(&str, u8)] = &[("auto", 0), ("free", 1), ("pinned", 2), ("spread", 3)];

impl Placement {
    /// Those that have a name.
    pub(super) fn words() -> impl Iterator<Item = &'static str> {
        PLACEMENTS.iter().map(|(word, _)| *word)
    }
}

impl TransportOptions {
    pub(super) fn read(fields: &mut Fields<'_>) -> Result<Self, Error> {
        let transport = fields.word("transport", Transport::WORDS)?;
        let depth = match fields.integer("depth")? {
            None => None,
            Some(number) => {
                let number = u16::try_from(number).ok().and_then(NonZeroU16::new);
                let expected = "a number from 1 to 1024";
                Some(number.ok_or_else(|| fields.expects("depth", expected))?)
            }
        };
        let max_payload = match fields.bytes("max-payload")? {
            None => None,
            Some(bytes) => {
                let expected = "less than 4G bytes";
                let bytes = u32::try_from(bytes).ok();
                Some(bytes.ok_or_else(|| fields.expects("max-payload", expected))?)
            }
        };
        Ok(Self {
            transport: transport.unwrap_or_default(),
            depth,
            max_payload,
            placement: read_placement(fields)?,
            passthrough: fields
                .word("passthrough", OnOffAuto::WORDS)?
                .unwrap_or(OnOffAuto::Off),
        })
    }
}

fn read_placement(fields: &mut Fields<'_>) -> Result<Placement, Error> {
    let named = fields.word("placement", PLACEMENTS)?;
    let list = match fields.name_or_list("cpus", "list of CPUs")? {
        None => None,
        Some(Err(one)) => Some(vec![one]),
        Some(Ok(several)) => Some(several),
    };
    match (named, list) {
        (Some(_), Some(_)) => Err(Error::Conflict {
            first: "placement",
            second: "cpus",
            reason: "the second says where the threads run",
        }),
        (None, Some(list)) => {
            let cpus = parse_cpus(&list);
            let expected = "CPUs such as 2 or 0-3 (several with cpus.0=, cpus.1=, ...)";
            Ok(Placement::Cpus(
                cpus.ok_or_else(|| fields.expects("cpus", expected))?,
            ))
        }
        (named, None) => Ok(match named {
            None | Some(0) => Placement::Auto,
            Some(1) => Placement::Free,
            Some(2) => Placement::Pinned,
            Some(_) => Placement::Spread,
        }),
    }
}

/// The CPUs that are named by numbers and ranges, in their order; `None` if that is not what they are.
pub fn parse_cpus(list: &[String]) -> Option<Vec<u16>> {
    let mut cpus = Vec::new();
    for range in list {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        if first > last {
            return None;
        }
        cpus.extend(first..=last);
    }
    (!cpus.is_empty()).then_some(cpus)
}
