//! A terminal for programs that want one: a real pty of 80 × 24. Nobody reads it but the test, so a program that prints much
//! stands still until [`Terminal::shown`] is asked.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, fcntl_setfl, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// The side of the one who looks. Dropping it hangs the terminal up.
pub struct Terminal {
    outside: File,
    /// The programs' side, open so that its state can be asked for when they have ended.
    inside: OwnedFd,
    shown: Vec<u8>,
}

impl Terminal {
    /// A terminal that nobody uses yet.
    #[track_caller]
    pub fn open() -> Self {
        let ours = "our own terminal";
        let outside = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .expect("a pseudo terminal");
        grantpt(&outside).expect(ours);
        unlockpt(&outside).expect(ours);
        fcntl_setfl(&outside, OFlags::RDWR | OFlags::NONBLOCK).expect(ours);
        let name = ptsname(&outside, Vec::new()).expect(ours);
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let inside = open(&name, flags, Mode::empty()).expect(ours);
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&inside, size).expect(ours);
        Self {
            outside: outside.into(),
            inside,
            shown: Vec::new(),
        }
    }

    /// What programs are to have as their standard streams.
    pub(crate) fn inside(&self) -> OwnedFd {
        self.inside.try_clone().expect("a descriptor")
    }

    /// All that has been printed so far, with what steers the terminal.
    pub fn shown(&mut self) -> String {
        let mut piece = [0; 4096];
        while let Ok(len) = self.outside.read(&mut piece) {
            self.shown.extend_from_slice(&piece[..len]);
        }
        String::from_utf8_lossy(&self.shown).into_owned()
    }

    /// Its settings, as stty(1) shows and changes them.
    pub fn settings(&self) -> Termios {
        tcgetattr(&self.inside).expect("our own terminal")
    }

    /// Whether what is typed is seen, and handed over line by line: what shells and people count on.
    pub fn is_for_lines(&self) -> bool {
        let modes = self.settings().local_modes;
        modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }
}
