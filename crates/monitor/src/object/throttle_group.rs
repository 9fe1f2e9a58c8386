//! `throttle-group`: limits that nodes share. Keeps to none itself.

use serde_json::{Map, Value};

use super::qom::{self, Property};
use crate::error::Error;
use crate::fields::Fields;

/// Properties of a throttle group (`ThrottleGroupProperties` in QEMU's `qapi/qom.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThrottleGroupOptions {
    /// The group's name: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// What it allows. Default: everything.
    pub limits: ThrottleLimits,
}

/// Limits (`ThrottleLimits` in QEMU's `qapi/block-core.json`): in bytes or operations a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// `bps-total`: bytes read and written.
    pub bps_total: ThrottleRate,
    /// `bps-read`: bytes read.
    pub bps_read: ThrottleRate,
    /// `bps-write`: bytes written.
    pub bps_write: ThrottleRate,
    /// `iops-total`: all operations.
    pub iops_total: ThrottleRate,
    /// `iops-read`: reads.
    pub iops_read: ThrottleRate,
    /// `iops-write`: writes.
    pub iops_write: ThrottleRate,
    /// `iops-size`: operations longer than this many bytes count proportionally; 0: they count once.
    pub iops_size: u64,
}

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThrottleRate {
    /// In the long run; 0: none. Up to [`MAX_RATE`].
    pub average: u64,
    /// `…-max`: during a burst; 0: no bursts. Up to [`MAX_RATE`].
    pub max: u64,
    /// `…-max-length`: seconds for which `max` may be kept up.
    pub max_length: u64,
}

/// The largest limit (what QEMU takes).
pub const MAX_RATE: u64 = 1_000_000_000_000_000;

impl Default for ThrottleRate {
    fn default() -> Self {
        Self {
            average: 0,
            max: 0,
            max_length: 1,
        }
    }
}

/// What the properties of one limit are called.
struct Names {
    limits: [&'static str; 3],
    /// One by one, as properties of the object itself.
    single: [&'static str; 3],
}

macro_rules! names {
    ($name:literal) => {
        Names {
            limits: [$name, concat!($name, "-max"), concat!($name, "-max-length")],
            single: [
                concat!("x-", $name),
                concat!("x-", $name, "-max"),
                concat!("x-", $name, "-max-length"),
            ],
        }
    };
}

/// In the order of [`ThrottleLimits::rates`].
const NAMES: [Names; 6] = [
    names!("bps-total"),
    names!("bps-read"),
    names!("bps-write"),
    names!("iops-total"),
    names!("iops-read"),
    names!("iops-write"),
];

const SIZE: &str = "iops-size";
const SINGLE_SIZE: &str = "x-iops-size";

impl ThrottleGroupOptions {
    pub(super) fn read(mut fields: Fields<'_>) -> Result<Self, Error> {
        let id = fields.identifier("id")?;
        let id = fields.require("id", id)?.to_owned();
        let mut limits = ThrottleLimits::default();
        limits.read_single(&mut fields)?;
        if let Some(mut group) = fields.group("limits")? {
            limits.read_group(&mut group)?;
            group.finish()?;
        }
        fields.finish()?;
        limits.check()?;
        Ok(Self { id, limits })
    }

    pub(super) fn properties(&self) -> Vec<Property> {
        let mut all = vec![Property {
            name: "limits",
            kind: "ThrottleLimits",
            value: self.limits.to_json(),
        }];
        for (names, rate) in NAMES.iter().zip(self.limits.rates()) {
            let values = [rate.average, rate.max, rate.max_length];
            all.extend(names.single.iter().zip(values).map(Property::integer));
        }
        all.push(Property::integer((&SINGLE_SIZE, self.limits.iops_size)));
        all
    }

    /// Properties one by one belong to the making; `limits` may be changed at any time, and what is not given stays.
    pub(super) fn set(&mut self, name: &str, value: &Value) -> Result<(), Error> {
        if name != "limits" {
            return Err(Error::Object("Property cannot be set after initialization"));
        }
        let members = qom::single("limits", value);
        let mut fields = Fields::of_json(&members);
        let mut limits = self.limits;
        if let Some(mut group) = fields.group("limits")? {
            limits.read_group(&mut group)?;
            group.finish()?;
        }
        limits.check()?;
        self.limits = limits;
        Ok(())
    }
}

impl ThrottleLimits {
    fn rates(&self) -> [&ThrottleRate; 6] {
        [
            &self.bps_total,
            &self.bps_read,
            &self.bps_write,
            &self.iops_total,
            &self.iops_read,
            &self.iops_write,
        ]
    }

    fn rates_mut(&mut self) -> [&mut ThrottleRate; 6] {
        [
            &mut self.bps_total,
            &mut self.bps_read,
            &mut self.bps_write,
            &mut self.iops_total,
            &mut self.iops_read,
            &mut self.iops_write,
        ]
    }

    fn read_group(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        for (names, rate) in NAMES.iter().zip(self.rates_mut()) {
            let [average, max, max_length] = names.limits;
            set(&mut rate.average, fields.integer(average)?, RATE_RANGE)?;
            set(&mut rate.max, fields.integer(max)?, RATE_RANGE)?;
            rate.max_length = length(fields, max_length)?.unwrap_or(rate.max_length);
        }
        set(&mut self.iops_size, fields.integer(SIZE)?, RATE_RANGE)
    }

    fn read_single(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        const NEGATIVE: &str = "Property values cannot be negative";
        for (names, rate) in NAMES.iter().zip(self.rates_mut()) {
            let [average, max, max_length] = names.single;
            set(&mut rate.average, fields.integer(average)?, NEGATIVE)?;
            set(&mut rate.max, fields.integer(max)?, NEGATIVE)?;
            rate.max_length = length(fields, max_length)?.unwrap_or(rate.max_length);
        }
        set(&mut self.iops_size, fields.integer(SINGLE_SIZE)?, NEGATIVE)
    }

    /// Whether the limits go together, by QEMU's rules.
    ///
    /// # Errors
    /// The first rule that is broken, in QEMU's words.
    pub fn check(&self) -> Result<(), Error> {
        let both = |total: &ThrottleRate, read: &ThrottleRate, write: &ThrottleRate| {
            (total.average > 0 && (read.average > 0 || write.average > 0))
                || (total.max > 0 && (read.max > 0 || write.max > 0))
        };
        if both(&self.bps_total, &self.bps_read, &self.bps_write)
            || both(&self.iops_total, &self.iops_read, &self.iops_write)
        {
            return Err(Error::Object(
                "bps/iops/max total values and read/write values cannot be used at the same time",
            ));
        }
        let iops = [&self.iops_total, &self.iops_read, &self.iops_write];
        if self.iops_size > 0 && iops.iter().all(|rate| rate.average == 0) {
            return Err(Error::Object("iops size requires an iops value to be set"));
        }
        self.rates().into_iter().try_for_each(ThrottleRate::check)
    }

    /// As `qom-get` shows them.
    pub fn to_json(&self) -> Value {
        let mut all = Map::new();
        for (names, rate) in NAMES.iter().zip(self.rates()) {
            let values = [rate.average, rate.max, rate.max_length];
            let members = names.limits.iter().zip(values);
            all.extend(members.map(|(name, value)| ((*name).to_owned(), value.into())));
        }
        all.insert(SIZE.to_owned(), self.iops_size.into());
        Value::Object(all)
    }
}

impl ThrottleRate {
    fn check(&self) -> Result<(), Error> {
        let wrong = |message| Err(Error::Object(message));
        match *self {
            Self { average, max, .. } if average.max(max) > MAX_RATE => wrong(RATE_RANGE),
            Self { max_length: 0, .. } => wrong("the burst length cannot be 0"),
            Self {
                max: 0, max_length, ..
            } if max_length > 1 => wrong("burst length set without burst rate"),
            Self {
                max, max_length, ..
            } if max > 0 && max_length > MAX_RATE / max => {
                wrong("burst length too high for this burst rate")
            }
            Self {
                average: 0, max, ..
            } if max > 0 => wrong("bps_max/iops_max require corresponding bps/iops values"),
            Self { average, max, .. } if max > 0 && max < average => {
                wrong("bps_max/iops_max cannot be lower than bps/iops")
            }
            _ => Ok(()),
        }
    }
}

const RATE_RANGE: &str = "bps/iops/max values must be within [0, 1000000000000000]";

/// Takes a value that was given; `negative` is the complaint about one below zero.
fn set(place: &mut u64, value: Option<i64>, negative: &'static str) -> Result<(), Error> {
    if let Some(value) = value {
        *place = u64::try_from(value).map_err(|_| Error::Object(negative))?;
    }
    Ok(())
}

fn length(fields: &mut Fields<'_>, name: &'static str) -> Result<Option<u64>, Error> {
    let Some(value) = fields.integer(name)? else {
        return Ok(None);
    };
    let seconds = u32::try_from(value).map_err(|_| Error::LengthRange { name })?;
    Ok(Some(seconds.into()))
}

/// The names of all properties that the object is made with, for its help.
pub(crate) fn property_names() -> impl Iterator<Item = &'static str> {
    let single = NAMES.iter().flat_map(|names| names.single);
    single.chain([SINGLE_SIZE])
}
