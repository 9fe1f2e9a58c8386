//! Objects: iothreads, by name, and the one that serves whatever names none. Each is an event loop on a thread.

use std::collections::BTreeMap;
use std::time::Duration;

use diskfuse_monitor::{IothreadOptions, ObjectOptions};
use diskfuse_ring::{Choice, Config, IoThread, Mailbox, Polling};

use super::suggest;
use crate::error::{Error, Result};

/// The iothreads of the process.
pub struct Iothreads {
    choice: Choice,
    named: BTreeMap<String, IoThread>,
    /// Where exports live that name no iothread: what QEMU's main loop is to them. Made when it is needed.
    main: Option<IoThread>,
}

impl Iothreads {
    /// None yet; all event loops will stand on `choice`.
    pub fn new(choice: Choice) -> Self {
        Self {
            choice,
            named: BTreeMap::new(),
            main: None,
        }
    }

    /// What event loops stand on.
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// Makes the object.
    pub fn add(&mut self, options: &ObjectOptions) -> Result<()> {
        let ObjectOptions::Iothread(options) = options;
        let id = &options.id;
        if self.named.contains_key(id) {
            return Err(Error::Refused(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let config = Config {
            choice: self.choice,
            polling: polling(options),
        };
        // Linux shows fifteen bytes of it.
        let thread = IoThread::spawn(&format!("IO {id}"), config)?;
        self.named.insert(id.clone(), thread);
        Ok(())
    }

    /// The iothread of this name.
    pub fn get(&self, id: &str) -> Result<Mailbox> {
        let thread = self.named.get(id).ok_or_else(|| {
            let hint = suggest::hint(id, self.named.keys().map(String::as_str));
            Error::Refused(format!("iothread \"{id}\" not found{hint}"))
        })?;
        Ok(thread.mailbox().clone())
    }

    /// The one for exports that name none.
    pub fn main(&mut self) -> Result<Mailbox> {
        let thread = match &mut self.main {
            Some(thread) => thread,
            none => {
                let config = Config {
                    choice: self.choice,
                    polling: Polling::DEFAULT,
                };
                none.insert(IoThread::spawn("main-loop", config)?)
            }
        };
        Ok(thread.mailbox().clone())
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn iothread(argument: &str) -> ObjectOptions {
        ObjectOptions::parse(argument).unwrap()
    }

    #[test]
    fn iothreads_are_found_by_name_only_once_made_and_only_made_once() {
        let mut all = Iothreads::new(Choice::Auto);
        all.add(&iothread("iothread,id=io0")).unwrap();
        assert!(all.get("io0").is_ok());
        let error = all.get("i0o").unwrap_err().to_string();
        assert_eq!(error, "iothread \"i0o\" not found (did you mean 'io0'?)");
        let error = all
            .add(&iothread("iothread,id=io0"))
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "attempt to add duplicate property 'io0' to object (type 'container')"
        );
    }

    #[test]
    fn extreme_polling_is_bounded() {
        let ObjectOptions::Iothread(options) =
            iothread("iothread,id=a,poll-max-ns=9223372036854775807,poll-grow=9223372036854775807");
        let polling = polling(&options);
        assert_eq!(polling.grow, 1 << 16);
        assert_eq!(polling.shrink, 0);
    }
}
