#![allow(clippy::single_range_in_vec_init)] // A list of areas may have one.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The same by a list of bools.
struct Model(Vec<bool>);

impl Model {
    fn set(&mut self, range: Range<u64>, granularity: u64, to: bool) {
        let last = range.end.div_ceil(granularity);
        for bit in range.start / granularity..last {
            self.0[bit as usize] = to;
        }
    }

    fn areas(&self, granularity: u64, size: u64) -> Vec<Range<u64>> {
        let mut areas: Vec<Range<u64>> = Vec::new();
        for (bit, _) in (0..).zip(&self.0).filter(|(_, dirty)| **dirty) {
            let end = ((bit + 1) * granularity).min(size);
            match areas.last_mut() {
                Some(last) if last.end == bit * granularity => last.end = end,
                _ => areas.push(bit * granularity..end),
            }
        }
        areas
    }
}

fn areas(bitmap: &DirtyBitmap) -> Vec<Range<u64>> {
    let mut areas = Vec::new();
    let mut at = 0;
    while let Some(area) = bitmap.next_dirty(at, u64::MAX, u64::MAX) {
        at = area.end;
        areas.push(area);
    }
    areas
}

proptest::proptest! {
    #[test]
    fn it_is_what_a_list_of_bools_would_be(
        shift in 9u32..18,
        bits in 1u64..200_000,
        changes in proptest::collection::vec((0u64..1 << 40, 1u64..1 << 34, proptest::bool::ANY), 1..30),
    ) {
        let granularity = 1 << shift;
        let size = bits * granularity - 512 % granularity;
        let bitmap = DirtyBitmap::new(size, granularity).unwrap();
        let mut model = Model(vec![false; bits as usize]);
        for (start, len, to) in changes {
            let start = start % size;
            let end = (start + len % (size / 3 + 1) + 1).min(size);
            match to {
                true => bitmap.mark(start, end - start),
                false => bitmap.clear(start, end - start),
            };
            model.set(start..end, granularity, to);
        }
        let expected = model.areas(granularity, size);
        assert_eq!(areas(&bitmap), expected);
        let count = model.0.iter().filter(|dirty| **dirty).count() as u64;
        assert_eq!(bitmap.info().count, count * granularity);
        let taken = bitmap.take().unwrap();
        assert_eq!((areas(&taken), areas(&bitmap)), (expected, Vec::new()));
    }
}

#[test]
fn areas_are_cut_where_they_are_asked_to_be() {
    let bitmap = DirtyBitmap::new(1 << 20, 4 * KIB).unwrap();
    bitmap.mark(5 * KIB, 40 * KIB);
    assert_eq!(
        bitmap.next_dirty(0, u64::MAX, 8 * KIB),
        Some(4 * KIB..12 * KIB)
    );
    assert_eq!(bitmap.next_dirty(0, u64::MAX, 1), Some(4 * KIB..8 * KIB));
    assert_eq!(
        bitmap.next_dirty(13 * KIB, u64::MAX, u64::MAX),
        Some(13 * KIB..48 * KIB)
    );
    assert_eq!(
        bitmap.next_dirty(0, 10 * KIB, u64::MAX),
        Some(4 * KIB..10 * KIB)
    );
    assert_eq!(bitmap.next_dirty(48 * KIB, u64::MAX, u64::MAX), None);
    assert!(bitmap.is_dirty(46 * KIB, 1) && !bitmap.is_dirty(48 * KIB, KIB));
}

#[test]
fn a_disk_that_grows_is_dirty_where_it_is_new() {
    let bitmap = DirtyBitmap::new(1 << 20, 64 * KIB).unwrap();
    bitmap.follow(|| 100 << 20).unwrap();
    assert_eq!(areas(&bitmap), vec_of(1 << 20..100 << 20));
    bitmap.follow(|| 3 << 20).unwrap();
    assert_eq!(areas(&bitmap), vec_of(1 << 20..3 << 20));
    assert_eq!(bitmap.dirty_bytes(), 2 << 20);
    let other = DirtyBitmap::new(1 << 20, 64 * KIB).unwrap();
    let error = bitmap.merge(&other).unwrap_err().to_string();
    let words = "Bitmaps are of different sizes (destination size is 3145728, source size is 1048576) and can't be merged";
    assert_eq!(error, words);
}

#[test]
fn who_follows_an_older_size_takes_no_marks_of_a_newer_one_away() {
    let bitmap = DirtyBitmap::new(MIB, 64 * KIB).unwrap();
    let disk = AtomicU64::new(2 * MIB);
    std::thread::scope(|scope| {
        let (bitmap, disk) = (&bitmap, &disk);
        let (tell, told) = std::sync::mpsc::channel();
        let first = scope.spawn(move || {
            bitmap.follow(|| {
                let size = disk.load(SeqCst);
                tell.send(()).unwrap();
                // It loses the processor with the older size in its hands.
                std::thread::sleep(Duration::from_millis(100));
                size
            })
        });
        told.recv().unwrap();
        disk.store(8 * MIB, SeqCst);
        bitmap.follow(|| disk.load(SeqCst)).unwrap();
        bitmap.mark(7 * MIB, MIB);
        first.join().unwrap().unwrap();
    });
    assert_eq!(bitmap.size(), 8 * MIB);
    assert_eq!(areas(&bitmap), vec_of(MIB..8 * MIB));
}

#[test]
fn granularities_that_cannot_be_are_refused() {
    for (granularity, expected) in [
        (3000, "Granularity must be a power of 2"),
        (256, "Granularity must be between 512 and 2147483648 bytes"),
        (
            4 << 30,
            "Granularity must be between 512 and 2147483648 bytes",
        ),
    ] {
        let error = DirtyBitmap::new(1 << 20, granularity).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    let error = DirtyBitmap::new(1 << 62, 512).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
}

#[test]
fn marks_of_several_threads_are_all_there() {
    let bitmap = DirtyBitmap::new(1 << 30, 512).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let bitmap = &bitmap;
            scope.spawn(move || {
                for n in 0..20_000u64 {
                    bitmap.mark((n * 4 + thread) * 512, 512);
                }
            });
        }
    });
    assert_eq!(bitmap.dirty_bytes(), 80_000 * 512);
    assert_eq!(areas(&bitmap), vec_of(0..80_000 * 512));
}

/// One range, as a list.
fn vec_of(range: Range<u64>) -> Vec<Range<u64>> {
    std::iter::once(range).collect()
}

#[test]
fn bits_come_back_from_their_bytes_and_none_past_the_end() {
    let size = (70 << 10) + 1;
    let bitmap = DirtyBitmap::new(size, 1024).unwrap();
    bitmap.mark(0, 1);
    bitmap.mark(9 << 10, 1);
    bitmap.mark(size - 1, 1);
    assert_eq!(bitmap.bits_of_disk(), 71);
    let mut bytes = [0xff; 24];
    bitmap.copy_to_bytes(0, &mut bytes);
    assert_eq!((bytes[0], bytes[1], bytes[8]), (1, 2, 1 << 6));
    assert_eq!(bytes.iter().filter(|&&byte| byte != 0).count(), 3);
    let mut second = [0xff; 8];
    bitmap.copy_to_bytes(8, &mut second);
    assert_eq!(second, bytes[8..16]);

    let back = DirtyBitmap::new(size, 1024).unwrap();
    back.mark_from_bytes(0, &bytes[..8]);
    back.mark_from_bytes(8, &bytes[8..]);
    assert_eq!(back.info(), bitmap.info());
    assert!(back.is_dirty(size - 1, 1) && back.is_dirty(9 << 10, 1));
    // What somebody wrote past the end is not there.
    let full = DirtyBitmap::new(size, 1024).unwrap();
    full.mark_from_bytes(0, &[0xff; 24]);
    assert_eq!((full.info().count, full.dirty_bytes()), (71 << 10, size));
}
