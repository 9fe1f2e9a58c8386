//! Every interleaving of a few threads on a cache of L2 slices with one frame: run by
//! `cargo test -p diskfuse-qcow2 --features loom --lib slices_model`.

use std::task::Waker;

use loom::sync::Arc;
use loom::thread;

use super::Entry;
use super::slices::{Begin, Slices};

/// Tries every interleaving with at most two preemptions: the bound that finds nearly all mistakes, in seconds.
fn model(body: impl Fn() + Sync + Send + 'static) {
    with_preemptions(2, body);
}

fn with_preemptions(most: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(most);
    model.check(body);
}

/// One frame, slices of one entry.
fn cache(words_per_entry: usize) -> Arc<Slices> {
    Arc::new(Slices::new(1, words_per_entry, 2, 1).unwrap())
}

fn load(slices: &Slices, slice: u64, value: u64) -> bool {
    match slices.begin_load(slice, Waker::noop()).unwrap() {
        Begin::Load(loading) => {
            loading.publish([value, value].into_iter());
            true
        }
        _ => false,
    }
}

fn entry(value: u64) -> Entry {
    Entry {
        word: value,
        subclusters: value,
    }
}

#[test]
fn a_reader_never_takes_one_slice_for_another() {
    model(|| {
        let slices = cache(1);
        load(&slices, 0, 10);
        let reader = thread::spawn({
            let slices = Arc::clone(&slices);
            move || {
                if let Some(entry) = slices.get(0, 0) {
                    assert_eq!(entry.word, 10);
                }
                if let Some(entry) = slices.get(1, 0) {
                    assert_eq!(entry.word, 11);
                }
            }
        });
        // Marks are taken away by the first pass of the clock, so one call is enough.
        load(&slices, 1, 11);
        load(&slices, 0, 10);
        reader.join().unwrap();
    });
}

#[test]
fn entries_of_two_words_are_never_mixed() {
    model(|| {
        let slices = cache(2);
        load(&slices, 0, 10);
        let reader = thread::spawn({
            let slices = Arc::clone(&slices);
            move || {
                if let Some(entry) = slices.get(0, 0) {
                    assert_eq!(entry.word, entry.subclusters);
                }
            }
        });
        assert!(slices.store(0, 0, &[entry(20)]));
        reader.join().unwrap();
    });
}

#[test]
fn a_change_is_copied_for_the_disk_or_still_dirty() {
    model(|| {
        let slices = cache(1);
        load(&slices, 0, 10);
        let writer = thread::spawn({
            let slices = Arc::clone(&slices);
            // False if the slice is not there any more: whoever stores loads it again then.
            move || slices.store(0, 0, &[entry(20)])
        });
        let copies = slices.copy_dirty();
        let evicted = load(&slices, 1, 11);
        for copied in &copies {
            assert_eq!(copied.words, [20]);
            slices.written(copied.slice, true);
        }
        let stored = writer.join().unwrap();
        assert!(!(stored && evicted), "evicted before it was written");
        assert_eq!(copies.len() + slices.dirty(), usize::from(stored));
    });
}

#[test]
fn one_of_two_loads_and_both_find_it() {
    model(|| {
        let slices = cache(1);
        let other = thread::spawn({
            let slices = Arc::clone(&slices);
            move || load(&slices, 0, 10)
        });
        let mine = load(&slices, 0, 10);
        let theirs = other.join().unwrap();
        assert!(mine || theirs);
        assert_eq!(
            slices.get(0, 0),
            Some(Entry {
                word: 10,
                subclusters: 0
            })
        );
    });
}

/// The one who has ended a load does not take the frame away from whoever has it next. It takes three preemptions to get there.
#[test]
fn a_frame_has_one_slice() {
    with_preemptions(3, || {
        let slices = cache(1);
        let other = thread::spawn({
            let slices = Arc::clone(&slices);
            move || load(&slices, 0, 10)
        });
        load(&slices, 1, 11);
        other.join().unwrap();
        load(&slices, 0, 10);
        for (slice, value) in [(0, 10), (1, 11)] {
            if let Some(entry) = slices.get(slice, 0) {
                assert_eq!(entry.word, value, "slice {slice} shows another's");
            }
        }
    });
}
