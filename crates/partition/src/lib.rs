//! What is on a disk: its partition table (GPT or MBR), and the kinds, labels and UUIDs of file systems. A disk is hostile
//! until proved otherwise: whatever is on it, looking takes bounded memory and time, and never panics.
//!
//! What this crate does *not* do: it never writes, and it opens nothing by name.
//!
//! GPT is read by the crate `gpt`, which is given bytes of the disk that were read before (`blocks.rs`) and asked
//! nothing before the sizes in the headers were looked at, as it takes memory for what they say. MBR is read here: `mbrman`,
//! the crate for it, adds what the disk says without looking at overflows, follows chains without a limit, and stands on
//! `bincode`, which is not kept any more; four entries of 16 bytes do not need it.

mod blocks;
mod filesystem;
mod mbr;
mod name;
mod scan;
mod table;

pub use filesystem::FileSystem;
pub use name::file_name;
pub use scan::{Contents, scan};
pub use table::{Kind, MOST_PARTITIONS, Partition, Table};
