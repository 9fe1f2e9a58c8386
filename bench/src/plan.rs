//! Which cells the table has. Pure data: nothing is started or measured here.

use clap::ValueEnum;
use serde::Serialize;

/// What lies behind the exported file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// The null driver: no I/O at all.
    Null,
    /// An image file, read and written past the page cache.
    File,
    /// An image file that lies in the page cache.
    Cached,
    /// A qcow2 image that has all of its disk, read and written past the page cache.
    Qcow2,
    /// The same in the page cache.
    Qcow2Cached,
    /// A large qcow2 image with nothing in it, made anew for each measurement: writes allocate.
    Qcow2New,
}

/// How many times as large as other images a new one is, so that it does not fill up while it is measured.
const NEW_IS_LARGER: u64 = 64;

impl Target {
    /// Bytes of the disk where other images have `size`.
    pub fn size(self, size: u64) -> u64 {
        match self {
            Self::Qcow2New => size * NEW_IS_LARGER,
            _ => size,
        }
    }

    /// Whether the host's page cache is gone around.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::File | Self::Qcow2 | Self::Qcow2New)
    }
}

/// Direction of the transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Reads only.
    Read,
    /// Writes only.
    Write,
}

/// Order of the offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Ascending; each job in a region of its own.
    Seq,
    /// Uniformly random over the whole file.
    Rand,
}

/// How the load generator issues requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Linux AIO, many in flight.
    Aio,
    /// `pread`/`pwrite`, one in flight per job.
    Sync,
}

/// One workload: every contender runs it in every round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// What lies behind the export.
    pub target: Target,
    /// Reads or writes.
    pub direction: Direction,
    /// Sequential or random.
    pub pattern: Pattern,
    /// Asynchronous or synchronous.
    pub mode: Mode,
    /// Requests in flight per job; 1 for synchronous.
    pub depth: u32,
    /// Number of jobs (processes of the load generator).
    pub jobs: u32,
    /// Bytes per request.
    pub block_size: u32,
    /// Writes of one job between two fsyncs; 0 for none.
    pub fsync: u32,
}

impl Cell {
    /// Short unique name: `null read rand aio j4`.
    pub fn name(&self) -> String {
        format!("{} {}", self.panel(), self.group())
    }

    /// The part of the name that cells of one chart panel share.
    pub fn panel(&self) -> String {
        let size = match self.block_size >> 10 {
            4 => String::new(),
            kib if kib >= 1024 => format!(" {}M", kib >> 10),
            kib => format!(" {kib}k"),
        };
        let fsync = match self.fsync {
            0 => String::new(),
            writes => format!(" fsync/{writes}"),
        };
        format!(
            "{}{size} {}{fsync} j{}",
            word(self.target),
            word(self.mode),
            self.jobs
        )
    }

    /// The part of the name that tells cells of one chart panel apart.
    pub fn group(&self) -> String {
        format!("{} {}", word(self.direction), word(self.pattern))
    }

    /// Whether the figure that counts is bytes per second (large requests) and not requests per second.
    pub fn in_bytes(&self) -> bool {
        self.block_size >= 64 * 1024
    }

    /// Unit of the figure that counts.
    pub fn unit(&self) -> &'static str {
        if self.in_bytes() { "MiB/s" } else { "kIOPS" }
    }
}

/// The name of a value as the command line spells it.
pub fn word<T: ValueEnum + Copy>(value: T) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned())
}

/// A set of rows that can be asked for by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rows {
    /// 4 KiB requests on null and file: aio depth 64 and sync.
    #[value(name = "4k")]
    Small,
    /// 1 MiB sequential requests, aio depth 8, from and to the page cache.
    #[value(name = "seq1m")]
    Seq1m,
    /// 4 KiB requests on a raw and a qcow2 image that has all of its disk, past the page cache and in it.
    #[value(name = "qcow2")]
    Qcow2,
    /// Random writes of 4 and 64 KiB to a qcow2 image with nothing in it, with and without an fsync every 32 writes.
    #[value(name = "allocate")]
    Allocate,
}

/// The axes of a row set; its cells are their product.
struct Axes {
    targets: &'static [Target],
    directions: &'static [Direction],
    patterns: &'static [Pattern],
    modes: &'static [(Mode, u32)],
    jobs: &'static [u32],
    block_sizes: &'static [u32],
    fsyncs: &'static [u32],
}

/// The axes that most row sets have in common.
const PLAIN: Axes = Axes {
    targets: &[Target::Null, Target::File],
    directions: &[Direction::Read, Direction::Write],
    patterns: &[Pattern::Seq, Pattern::Rand],
    modes: &[(Mode::Aio, 64), (Mode::Sync, 1)],
    jobs: &[1, 4],
    block_sizes: &[4096],
    fsyncs: &[0],
};

impl Rows {
    fn axes(self) -> Axes {
        match self {
            Self::Small => PLAIN,
            Self::Seq1m => Axes {
                targets: &[Target::Cached],
                patterns: &[Pattern::Seq],
                modes: &[(Mode::Aio, 8)],
                jobs: &[1],
                block_sizes: &[1 << 20],
                ..PLAIN
            },
            Self::Qcow2 => Axes {
                targets: &[
                    Target::File,
                    Target::Qcow2,
                    Target::Cached,
                    Target::Qcow2Cached,
                ],
                ..PLAIN
            },
            Self::Allocate => Axes {
                targets: &[Target::Qcow2New],
                directions: &[Direction::Write],
                patterns: &[Pattern::Rand],
                modes: &[(Mode::Aio, 64)],
                block_sizes: &[4096, 64 << 10],
                fsyncs: &[0, 32],
                ..PLAIN
            },
        }
    }

    fn cells(self) -> Vec<Cell> {
        let axes = self.axes();
        let mut cells = Vec::new();
        for &block_size in axes.block_sizes {
            for &fsync in axes.fsyncs {
                for &(mode, depth) in axes.modes {
                    for &jobs in axes.jobs {
                        axes.shapes(|target, direction, pattern| {
                            cells.push(Cell {
                                target,
                                direction,
                                pattern,
                                mode,
                                depth,
                                jobs,
                                block_size,
                                fsync,
                            });
                        });
                    }
                }
            }
        }
        // Stable: the other axes stay in the order of the table.
        cells.sort_by_key(|cell| {
            axes.targets
                .iter()
                .position(|target| *target == cell.target)
        });
        cells
    }
}

impl Axes {
    fn shapes(&self, mut each: impl FnMut(Target, Direction, Pattern)) {
        for &target in self.targets {
            for &direction in self.directions {
                for &pattern in self.patterns {
                    each(target, direction, pattern);
                }
            }
        }
    }
}

/// Which cells of the row sets are wanted; an empty list wants all.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Row sets.
    pub rows: Vec<Rows>,
    /// Targets.
    pub targets: Vec<Target>,
    /// Directions.
    pub directions: Vec<Direction>,
    /// Patterns.
    pub patterns: Vec<Pattern>,
    /// Modes.
    pub modes: Vec<Mode>,
    /// Numbers of jobs.
    pub jobs: Vec<u32>,
}

/// The cells that `filter` leaves, in the order of the table.
pub fn cells(filter: &Filter) -> Vec<Cell> {
    fn wanted<T: PartialEq>(list: &[T], value: &T) -> bool {
        list.is_empty() || list.contains(value)
    }
    let rows: &[Rows] = if filter.rows.is_empty() {
        Rows::value_variants()
    } else {
        &filter.rows
    };
    let mut cells: Vec<Cell> = Vec::new();
    for cell in rows.iter().flat_map(|rows| rows.cells()) {
        // Sets have cells in common.
        if !cells.contains(&cell) {
            cells.push(cell);
        }
    }
    cells.retain(|cell| {
        wanted(&filter.targets, &cell.target)
            && wanted(&filter.directions, &cell.direction)
            && wanted(&filter.patterns, &cell.pattern)
            && wanted(&filter.modes, &cell.mode)
            && wanted(&filter.jobs, &cell.jobs)
    });
    cells
}

/// The order in which `count` contenders run in `round`: each round begins one further, so that none always runs in the
/// wake of the same neighbour's heat, cache or throttle.
pub fn order(count: usize, round: u32) -> impl Iterator<Item = usize> {
    let start = if count == 0 {
        0
    } else {
        round as usize % count
    };
    (start..count).chain(0..start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(filter: &Filter) -> Vec<String> {
        cells(filter).iter().map(Cell::name).collect()
    }

    #[test]
    fn small_rows_are_the_full_product_without_repeats() {
        let mut names = names(&Filter {
            rows: vec![Rows::Small],
            ..Filter::default()
        });
        assert_eq!(names.len(), 2 * 2 * 2 * 2 * 2);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 32);
    }

    #[test]
    fn sync_cells_have_one_request_in_flight_and_aio_cells_64() {
        for cell in cells(&Filter {
            rows: vec![Rows::Small],
            ..Filter::default()
        }) {
            assert_eq!(
                cell.depth,
                if cell.mode == Mode::Sync { 1 } else { 64 },
                "{}",
                cell.name()
            );
            assert_eq!(cell.block_size, 4096);
        }
    }

    #[test]
    fn cells_that_sets_have_in_common_are_measured_once() {
        let mut names = names(&Filter {
            rows: vec![Rows::Small, Rows::Qcow2],
            ..Filter::default()
        });
        assert_eq!(names.len(), 32 + 3 * 16);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 32 + 3 * 16);
    }

    #[test]
    fn filters_are_combined() {
        let filter = Filter {
            rows: vec![Rows::Small],
            targets: vec![Target::Null],
            directions: vec![Direction::Read],
            modes: vec![Mode::Aio],
            jobs: vec![4],
            ..Filter::default()
        };
        assert_eq!(
            names(&filter),
            ["null aio j4 read seq", "null aio j4 read rand"]
        );
    }

    #[test]
    fn large_requests_are_counted_in_bytes() {
        let cells = cells(&Filter {
            rows: vec![Rows::Seq1m],
            ..Filter::default()
        });
        assert_eq!(
            cells.iter().map(Cell::name).collect::<Vec<_>>(),
            ["cached 1M aio j1 read seq", "cached 1M aio j1 write seq"]
        );
        assert!(
            cells
                .iter()
                .all(|cell| cell.unit() == "MiB/s" && cell.depth == 8)
        );
    }

    #[test]
    fn rows_that_allocate_tell_sizes_and_syncs_apart() {
        let mut names = names(&Filter {
            rows: vec![Rows::Allocate],
            ..Filter::default()
        });
        assert_eq!(names.len(), 2 * 2 * 2);
        assert!(names.contains(&"qcow2-new 64k aio fsync/32 j4 write rand".to_owned()));
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 8);
    }

    #[test]
    fn every_round_runs_everyone_once_and_begins_with_another() {
        for round in 0..7 {
            let mut order: Vec<usize> = order(5, round).collect();
            assert_eq!(order[0], round as usize % 5);
            order.sort_unstable();
            assert_eq!(order, [0, 1, 2, 3, 4]);
        }
        assert_eq!(order(0, 3).count(), 0);
    }
}
