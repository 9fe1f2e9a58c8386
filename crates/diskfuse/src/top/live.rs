//! The live view: a table that fills the terminal, keys to sort it and to leave. The terminal is given back as it was however the
//! view ends: by a key, by a signal, on an error and on a panic. It must never go on when its terminal has gone.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row as TableRow, Table};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::News;
use super::figures::{Order, Row, sort};
use super::table::{COLUMNS, NARROW, cells, lines};
use crate::error::{Error, Plain, Result};

/// How long keys are waited for before it is looked for news.
const TICK: Duration = Duration::from_millis(250);

const HELP: &str = "q quit  e queues  sort: i iops  b bytes  l latency  d depth  n name  ↑↓ scroll";

/// What is on the screen.
#[derive(Default)]
struct View {
    rows: Vec<Row>,
    silent: Vec<String>,
    order: Order,
    queues: bool,
    /// Lines that are scrolled past.
    skipped: usize,
    /// Something was heard of the daemons.
    heard: bool,
}

/// What the one who looks wants.
enum Wish {
    /// A key was pressed, or the terminal has another size.
    Input(Event),
    /// The terminal cannot be read any more.
    Unreadable(io::Error),
    /// A signal that ends the process.
    End,
}

/// Shows what comes over `news` until the user leaves or a signal ends it.
pub(super) fn run(news: &Receiver<News>, queues: bool) -> Result<()> {
    let failed = "Could not use the terminal (--batch needs none)";
    // Before the terminal is changed: from here on a signal cannot end the process while it is.
    let signals = Signals::new([SIGHUP, SIGINT, SIGTERM])
        .map_err(Error::system("Could not set up signals"))?;
    let mut terminal = ratatui::try_init().map_err(Error::system(failed))?;
    let mut view = View {
        queues,
        ..View::default()
    };
    let outcome = wishes(signals).and_then(|wishes| show(&mut terminal, &mut view, news, &wishes));
    // Both fail when the terminal has gone, and then there is nothing to restore and nobody to be told.
    let restored = ratatui::try_restore().and_then(|()| terminal.show_cursor());
    if restored.is_err() {
        // It would try again, and panic when it cannot say that it failed.
        std::mem::forget(terminal);
    }
    outcome.map_err(Error::system(failed))
}

/// Listens to the keys and to the signals, each on a thread of its own: a terminal that has gone never lets go of its reader.
fn wishes(mut signals: Signals) -> io::Result<Receiver<Wish>> {
    let (sender, wishes) = channel();
    let keys = sender.clone();
    let named = |name: &str| thread::Builder::new().name(name.to_owned());
    named("keys").spawn(move || read_keys(&keys))?;
    named("signals").spawn(move || {
        for _ in signals.forever() {
            if sender.send(Wish::End).is_err() {
                return;
            }
        }
    })?;
    Ok(wishes)
}

fn read_keys(wishes: &Sender<Wish>) {
    loop {
        let (wish, goes_on) = match event::read() {
            Ok(event) => (Wish::Input(event), true),
            Err(error) => (Wish::Unreadable(error), false),
        };
        if wishes.send(wish).is_err() || !goes_on {
            return;
        }
    }
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    news: &Receiver<News>,
    wishes: &Receiver<Wish>,
) -> io::Result<()> {
    let mut changed = true;
    loop {
        if changed {
            terminal.draw(|frame| view.draw(frame))?;
        }
        changed = false;
        match wishes.recv_timeout(TICK) {
            Ok(Wish::Input(Event::Key(key))) if key.kind == KeyEventKind::Press => {
                if !view.pressed(key) {
                    return Ok(());
                }
                changed = true;
            }
            Ok(Wish::Input(Event::Resize(..))) => changed = true,
            Ok(Wish::Input(_)) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Wish::Unreadable(error)) => return Err(error),
            Ok(Wish::End) => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(io::Error::other("nobody reads the keys any more"));
            }
        }
        loop {
            match news.try_recv() {
                Ok(news) => view.take(news),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    return Err(io::Error::other("nobody asks the daemons any more"));
                }
            }
            changed = true;
        }
    }
}

impl View {
    fn take(&mut self, news: News) {
        (self.rows, self.silent) = (news.rows, news.silent);
        self.heard = true;
        sort(&mut self.rows, self.order);
    }

    /// False: the user leaves.
    fn pressed(&mut self, key: KeyEvent) -> bool {
        let order = match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
            KeyCode::Char('e' | ' ') => {
                self.queues = !self.queues;
                return true;
            }
            KeyCode::Up => {
                self.skipped = self.skipped.saturating_sub(1);
                return true;
            }
            KeyCode::Down => {
                // Drawing sets the limit.
                self.skipped = self.skipped.saturating_add(1);
                return true;
            }
            KeyCode::Char('n') => Order::Name,
            KeyCode::Char('i') => Order::Requests,
            KeyCode::Char('b') => Order::Bytes,
            KeyCode::Char('l') => Order::Latency,
            KeyCode::Char('d') => Order::Depth,
            _ => return true,
        };
        self.order = order;
        sort(&mut self.rows, order);
        true
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let silent = u16::try_from(self.silent.len().min(3)).unwrap_or(3);
        let areas = Layout::vertical([
            Constraint::Length(1),
            Constraint::Min(2),
            Constraint::Length(silent),
            Constraint::Length(1),
        ]);
        let [head, table, notes, help] = areas.areas(frame.area());
        let requests = self.rows.iter().map(|row| row.whole.requests());
        // A sum of nothing would be -0.
        let requests = requests.fold(0.0, |sum, of_row| sum + of_row);
        let count = self.rows.len();
        let title = format!("diskfuse top   {count} shown   {requests:.0} requests/s");
        frame.render_widget(Line::from(title).style(Modifier::BOLD), head);
        if self.rows.is_empty() {
            let words = match self.heard {
                true => "Nothing is shown at the moment; waiting for a daemon (diskfuse mount).",
                false => "Asking the daemons …",
            };
            frame.render_widget(Paragraph::new(words), table);
        } else {
            self.draw_table(frame, table);
        }
        let sentences = self.silent.iter().take(3);
        let sentences: Vec<Line<'_>> = sentences
            .map(|sentence| Line::from(Plain(sentence).to_string()))
            .collect();
        frame.render_widget(Paragraph::new(sentences), notes);
        frame.render_widget(Line::from(HELP).style(Modifier::DIM), help);
    }

    fn draw_table(&mut self, frame: &mut Frame<'_>, area: Rect) {
        let behind = |count: usize| -> u16 {
            let columns = COLUMNS.iter().take(count);
            columns.map(|column| column.width + 1).sum()
        };
        let shown = match area.width >= behind(COLUMNS.len()) + 24 {
            true => COLUMNS.len(),
            false => NARROW,
        };
        let room = usize::from(area.width.saturating_sub(behind(shown)).max(8));
        let lines = lines(&self.rows, self.queues);
        // The heading takes one.
        let most = usize::from(area.height.saturating_sub(1));
        self.skipped = self.skipped.min(lines.len().saturating_sub(most));
        let rows = lines.iter().skip(self.skipped).take(most);
        let rows = rows.map(|(name, figures)| {
            let cells = cells(figures).take(shown);
            let cells = cells.map(|cell| Cell::from(Line::from(cell).right_aligned()));
            TableRow::new(std::iter::once(Cell::from(shortened(name, room))).chain(cells))
        });
        let headings = COLUMNS.iter().take(shown);
        let headings =
            headings.map(|column| Cell::from(Line::from(column.heading).right_aligned()));
        let header = TableRow::new(std::iter::once(Cell::from("MOUNTPOINT")).chain(headings));
        let columns = COLUMNS.iter().take(shown);
        let columns = columns.map(|column| Constraint::Length(column.width));
        let name = u16::try_from(room).unwrap_or(u16::MAX);
        let widths = std::iter::once(Constraint::Length(name)).chain(columns);
        let reversed = Style::default().add_modifier(Modifier::REVERSED);
        frame.render_widget(
            Table::new(rows, widths).header(header.style(reversed)),
            area,
        );
    }
}

/// The end of a name that is too long: that is where names differ.
fn shortened(name: &str, room: usize) -> String {
    let count = name.chars().count();
    if count <= room {
        return name.to_owned();
    }
    let end = name.chars().skip(count - room.saturating_sub(1));
    std::iter::once('…').chain(end).collect()
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::figures::tests::{between, export};
    use super::*;

    fn view(names: &[&str]) -> View {
        let all = |reads| names.iter().map(|name| export(name, reads)).collect();
        let mut view = View::default();
        view.take(News {
            rows: between(all(0), all(200)),
            silent: Vec::new(),
        });
        view
    }

    fn screen(view: &mut View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let text = terminal.backend().to_string();
        // The backend shows each line in quotation marks.
        text.lines()
            .map(|line| line.trim_matches('"').trim_end().to_owned())
            .collect()
    }

    fn press(view: &mut View, code: KeyCode) -> bool {
        view.pressed(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn eighty_columns_are_enough() {
        let mut view = view(&["/srv/disks/a/very/long/name/of/a.disk"]);
        let lines = screen(&mut view, 80, 24);
        assert_eq!(lines[0], "diskfuse top   1 shown   100 requests/s");
        assert!(
            lines[1].starts_with("MOUNTPOINT ") && lines[1].ends_with(" DEPTH CACHE POLL"),
            "{}",
            lines[1]
        );
        assert!(
            lines[2].starts_with('…') && lines[2].contains("of/a.disk "),
            "{}",
            lines[2]
        );
        assert!(
            lines[2].ends_with("   100    0.0     0.4     0.0    2µ    2µ     2   75%  10%"),
            "{}",
            lines[2]
        );
        assert_eq!(lines[23], HELP);
        let wide = screen(&mut view, 140, 24);
        assert!(wide[1].ends_with(" P99.9 SPINS  ERR/s"), "{}", wide[1]);
    }

    #[test]
    fn keys_expand_sort_scroll_and_leave() {
        let names: Vec<String> = (0..30).map(|number| format!("/m{number:02}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut view = view(&names);
        let lines = screen(&mut view, 80, 24);
        assert!(lines[2].starts_with("/m00") && lines[22].starts_with("/m20"));
        (0..100).for_each(|_| assert!(press(&mut view, KeyCode::Down)));
        let lines = screen(&mut view, 80, 24);
        assert!(lines[22].starts_with("/m29"), "{lines:?}");
        (0..100).for_each(|_| assert!(press(&mut view, KeyCode::Up)));
        assert!(press(&mut view, KeyCode::Char('e')));
        assert!(screen(&mut view, 80, 24)[3].starts_with("  queue 0"));
        for key in "nibld".chars() {
            assert!(press(&mut view, KeyCode::Char(key)));
        }
        assert_eq!(view.order, Order::Depth);
        assert!(!press(&mut view, KeyCode::Char('q')));
    }

    #[test]
    fn it_says_that_nobody_is_there_and_who_does_not_answer() {
        let mut view = view(&[]);
        view.silent
            .push("the daemon with process id 7 does not answer\u{1b}".to_owned());
        let lines = screen(&mut view, 80, 24);
        assert!(lines[1].starts_with("Nothing is shown at the moment"));
        assert!(lines[22].contains("process id 7"));
        // However small it is.
        for (width, height) in [(1, 1), (10, 3), (40, 5), (300, 100)] {
            screen(&mut view, width, height);
        }
    }
}
