//! Bytes of the format and what they mean. No I/O but for reading the header. It must never accept what cannot be
//! right. (Source: QEMU's `docs/interop/qcow2` specification.)

mod backing;
pub mod bitmap;
mod bitmap_place;
mod compress;
mod entry;
mod extensions;
pub mod features;
mod geometry;
mod header;
pub mod refcount;
mod subclusters;

pub use compress::{compress, decompress};
pub use entry::{COMPRESSED, COPIED, CompressedRange, L1Entry, Mapping, OFFSET_MASK, ZERO};
pub use extensions::{BitmapsExtension, Extension, FeatureName};
pub use geometry::{CLUSTER_BITS, Geometry, SUBCLUSTERS};
pub use header::{Backing, Compression, Encryption, Header};
pub use subclusters::{SubclusterKind, Subclusters};
