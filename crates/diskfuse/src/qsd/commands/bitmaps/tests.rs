//! What a bitmap that is of no use any more is good for.

use diskfuse_block::Graph;
use diskfuse_monitor::BlockdevOptions;
use diskfuse_ring::Choice;

use super::*;
use crate::qsd::monitor::Monitors;
use crate::qsd::objects::Objects;

#[test]
fn an_inconsistent_bitmap_can_be_removed_and_nothing_else() {
    let objects = Objects::new(Choice::Auto);
    let nodes = Nodes::new(Graph::new(), objects, Monitors::new(drop));
    let disk = BlockdevOptions::parse("null-co,node-name=disk,size=1M").unwrap();
    nodes.add(&disk).unwrap();
    let mut bitmaps = Bitmaps::default();
    let add = BlockDirtyBitmapAdd {
        node: "disk".to_owned(),
        name: "b".to_owned(),
        granularity: None,
        persistent: None,
        disabled: None,
    };
    bitmaps.add(&nodes, &add).unwrap();
    let which = BlockDirtyBitmap {
        node: "disk".to_owned(),
        name: "b".to_owned(),
    };
    let entry = bitmaps.find(&nodes, "disk", "b").unwrap();
    entry.bitmap.set_inconsistent();
    let words = "Bitmap 'b' is inconsistent and cannot be used";
    let refused = [
        bitmaps.clear(&nodes, &which).map(drop),
        bitmaps.record(&nodes, &which, false).map(drop),
        bitmaps.usable(&nodes, "disk", "b", false).map(drop),
    ];
    for outcome in refused {
        let error = outcome.unwrap_err().to_string();
        assert!(error.starts_with(words), "{error}");
    }
    let removed = bitmaps.remove(&nodes, &which).unwrap();
    assert!(bitmaps.of(&nodes, "disk").is_none());
    // A transaction that fails has it as it was.
    bitmaps.put_back(&nodes, removed).unwrap();
    let there = bitmaps.of(&nodes, "disk").unwrap();
    assert_eq!(there[0].inconsistent, Some(true));
    bitmaps.remove(&nodes, &which).unwrap();
    bitmaps.add(&nodes, &add).unwrap();
    bitmaps.clear(&nodes, &which).unwrap();
}
