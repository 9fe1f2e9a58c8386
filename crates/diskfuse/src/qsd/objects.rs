//! Objects, by their ids: iothreads, each an event loop on a thread; throttle groups; secrets. An object lives until it is
//! removed, which is refused while something uses it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use diskfuse_block::drivers::{Rate, Rates, ThrottleGroup};
use diskfuse_monitor::{
    IothreadOptions, ObjectOptions, Property, SecretOptions, SecretSource, ThrottleLimits,
    ThrottleRate,
};
use diskfuse_ring::{Choice, Config, IoThread, Polling};
use parking_lot::Mutex;
use serde_json::Value;

use super::suggest;
use crate::error::{Error, Result};

/// The objects of the process. A handle: clones are the same objects. May be used from any thread without a ring; making
/// and removing an iothread waits for the thread.
#[derive(Clone)]
pub struct Objects(Arc<Table>);

struct Table {
    choice: Choice,
    named: Mutex<BTreeMap<String, Object>>,
    /// Where exports live that name no iothread: what QEMU's main loop is to them. Made when it is needed.
    main: Mutex<Option<Arc<IoThread>>>,
}

/// One object: what was said of it, as it is now, and what it is.
struct Object {
    options: ObjectOptions,
    thing: Thing,
}

#[derive(Clone)]
enum Thing {
    Iothread(Arc<IoThread>),
    ThrottleGroup(Arc<ThrottleGroup>),
    /// Nothing asks for one yet, so that it could be read is all that is known of it.
    Secret,
}

impl Thing {
    fn make(options: &ObjectOptions, choice: Choice) -> Result<Self> {
        match options {
            ObjectOptions::Iothread(iothread) => {
                let config = Config {
                    choice,
                    polling: polling(iothread),
                };
                // Linux shows fifteen bytes of it.
                let thread = IoThread::spawn(&format!("IO {}", iothread.id), config)?;
                Ok(Self::Iothread(Arc::new(thread)))
            }
            ObjectOptions::ThrottleGroup(group) => {
                let group = ThrottleGroup::new(limits(&group.limits));
                Ok(Self::ThrottleGroup(group))
            }
            ObjectOptions::Secret(secret) => {
                check_secret(secret)?;
                Ok(Self::Secret)
            }
        }
    }

    /// Makes it as it is described.
    fn follow(&self, options: &ObjectOptions) -> Result<()> {
        match (self, options) {
            (Self::Iothread(thread), ObjectOptions::Iothread(options)) => {
                thread.set_polling(polling(options))?;
            }
            (Self::ThrottleGroup(group), ObjectOptions::ThrottleGroup(options)) => {
                group.set_limits(limits(&options.limits));
            }
            _ => {}
        }
        Ok(())
    }
}

impl Objects {
    /// None yet; all event loops will stand on `choice`.
    pub fn new(choice: Choice) -> Self {
        Self(Arc::new(Table {
            choice,
            named: Mutex::new(BTreeMap::new()),
            main: Mutex::new(None),
        }))
    }

    /// What event loops stand on.
    pub fn choice(&self) -> Choice {
        self.0.choice
    }

    /// Makes the object.
    pub fn add(&self, options: ObjectOptions) -> Result<()> {
        let id = options.id().to_owned();
        let duplicate = || {
            Err(Error::Refused(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )))
        };
        if self.0.named.lock().contains_key(&id) {
            return duplicate();
        }
        let thing = Thing::make(&options, self.0.choice)?;
        let object = Object { options, thing };
        let mut named = self.0.named.lock();
        if named.contains_key(&id) {
            // Another thread was faster; ours goes when the lock is free again.
            drop(named);
            drop(object);
            return duplicate();
        }
        named.insert(id, object);
        Ok(())
    }

    /// The iothread of this name. It is in use as long as what is returned is kept.
    pub fn iothread(&self, id: &str) -> Result<Arc<IoThread>> {
        let named = self.0.named.lock();
        let is_one = |object: &Object| matches!(object.thing, Thing::Iothread(_));
        match named.get(id).map(|object| &object.thing) {
            Some(Thing::Iothread(thread)) => Ok(Arc::clone(thread)),
            _ => {
                let hint = hint(&named, id, is_one);
                Err(Error::Refused(format!("iothread \"{id}\" not found{hint}")))
            }
        }
    }

    /// The throttle group of this name. It is in use as long as what is returned is kept.
    pub fn throttle_group(&self, id: &str) -> Result<Arc<ThrottleGroup>> {
        let named = self.0.named.lock();
        let is_one = |object: &Object| matches!(object.thing, Thing::ThrottleGroup(_));
        match named.get(id).map(|object| &object.thing) {
            Some(Thing::ThrottleGroup(group)) => Ok(Arc::clone(group)),
            _ => {
                let hint = hint(&named, id, is_one);
                let message = format!("Throttle group '{id}' does not exist{hint}");
                Err(Error::Refused(message))
            }
        }
    }

    /// The one for exports that name none.
    pub fn main(&self) -> Result<Arc<IoThread>> {
        // Held while the thread starts: there must be one only.
        let mut main = self.0.main.lock();
        let thread = match &mut *main {
            Some(thread) => thread,
            none => {
                let config = Config {
                    choice: self.0.choice,
                    polling: Polling::DEFAULT,
                };
                none.insert(Arc::new(IoThread::spawn("main-loop", config)?))
            }
        };
        Ok(Arc::clone(thread))
    }
}

/// What the monitor asks of objects that are there already.
impl Objects {
    /// Takes the object away, and waits for its thread if it is one. Refused while something uses it.
    pub fn remove(&self, id: &str) -> Result<()> {
        let removed = {
            let mut named = self.0.named.lock();
            match named.get(id) {
                None => return Err(Error::Refused(format!("object '{id}' not found"))),
                Some(object) if is_used(&object.thing) => {
                    return Err(Error::Refused(match &object.thing {
                        Thing::ThrottleGroup(_) => {
                            format!("Cannot delete throttle group '{id}' with active references")
                        }
                        _ => format!("object '{id}' is in use, can not be deleted"),
                    }));
                }
                Some(_) => named.remove(id),
            }
        };
        drop(removed);
        Ok(())
    }

    /// The ids and types of all objects, as children of `/objects`.
    pub fn list(&self) -> Vec<(String, &'static str)> {
        let named = self.0.named.lock();
        let all = named.iter();
        all.map(|(id, object)| (id.clone(), object.options.type_name()))
            .collect()
    }

    /// All iothreads, as they are described now, with the number of their thread.
    pub fn iothreads(&self) -> Vec<(IothreadOptions, u32)> {
        let named = self.0.named.lock();
        let all = named.values();
        all.filter_map(|object| match (&object.options, &object.thing) {
            (ObjectOptions::Iothread(options), Thing::Iothread(thread)) => {
                Some((options.clone(), thread.thread_id()))
            }
            _ => None,
        })
        .collect()
    }

    /// All properties of an object; `None` if there is no such object.
    pub fn properties(&self, id: &str) -> Option<Vec<Property>> {
        let named = self.0.named.lock();
        named.get(id).map(|object| object.options.properties())
    }

    /// One property of an object; `None` if there is no such object.
    pub fn property(&self, id: &str, name: &str) -> Option<Result<Property>> {
        let named = self.0.named.lock();
        let object = named.get(id)?;
        Some(object.options.property(name).map_err(Error::from))
    }

    /// Changes a property of an object, which takes effect at once; `None` if there is no such object.
    pub fn set(&self, id: &str, name: &str, value: &Value) -> Option<Result<()>> {
        let mut named = self.0.named.lock();
        let object = named.get_mut(id)?;
        let mut options = object.options.clone();
        Some(
            options
                .set(name, value)
                .map_err(Error::from)
                .and_then(|()| object.thing.follow(&options))
                .map(|()| object.options = options),
        )
    }
}

/// Whether somebody holds it beside the table.
fn is_used(thing: &Thing) -> bool {
    match thing {
        Thing::Iothread(thread) => Arc::strong_count(thread) > 1,
        Thing::ThrottleGroup(group) => Arc::strong_count(group) > 1,
        Thing::Secret => false,
    }
}

fn hint(named: &BTreeMap<String, Object>, id: &str, is_one: impl Fn(&Object) -> bool) -> String {
    let fitting = named.iter().filter(|(_, object)| is_one(object));
    suggest::hint(id, fitting.map(|(name, _)| name.as_str()))
}

/// The event loop hands over everything at once; `aio-max-batch` has nothing to limit.
fn polling(options: &IothreadOptions) -> Polling {
    // Factors beyond this change nothing: the first step reaches the limit.
    let factor = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).min(1 << 16);
    Polling {
        max: Duration::from_nanos(options.poll_max_ns),
        grow: factor(options.poll_grow),
        shrink: factor(options.poll_shrink),
    }
}

/// As the driver has them.
fn limits(limits: &ThrottleLimits) -> diskfuse_block::drivers::ThrottleLimits {
    let rate = |rate: &ThrottleRate| Rate {
        average: rate.average,
        burst: rate.max,
        burst_seconds: rate.max_length,
    };
    let rates = |total, read, write| Rates {
        total: rate(total),
        read: rate(read),
        write: rate(write),
    };
    diskfuse_block::drivers::ThrottleLimits {
        bytes: rates(&limits.bps_total, &limits.bps_read, &limits.bps_write),
        operations: rates(&limits.iops_total, &limits.iops_read, &limits.iops_write),
        operation_size: limits.iops_size,
    }
}

/// The longest file that is taken for a secret.
const LONGEST_SECRET: u64 = 1 << 20;

/// Whether the file of a secret can be read, and holds one; what the options say themselves has been checked.
fn check_secret(secret: &SecretOptions) -> Result<()> {
    let SecretSource::File(path) = &secret.source else {
        return Ok(());
    };
    let written = read_secret(path).map_err(Error::system(format!(
        "Unable to read {}: Failed to open file \u{201c}{}\u{201d}",
        path.display(),
        path.display()
    )))?;
    Ok(secret.check(&written)?)
}

fn read_secret(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut written = Vec::new();
    File::open(path)?
        .take(LONGEST_SECRET)
        .read_to_end(&mut written)?;
    Ok(written)
}

#[cfg(test)]
mod tests;
