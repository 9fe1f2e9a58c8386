//! The drivers `null`, `file`, `host_device` and `raw` as their users see them.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    BACKENDS, SmallDisk, directory, file_config, image, message, must, open, pattern, read, run,
    write,
};
use diskfuse_block::drivers::{
    FileConfig, NullConfig, RawConfig, open_file, open_host_device, open_null, open_raw,
};
use diskfuse_block::{Access, Extent, Kind, Node, Resize, Zeroes};

#[test]
fn a_null_disk_reads_as_zeroes_and_takes_its_time() {
    for choice in BACKENDS {
        let fast = open_null(&NullConfig::default()).unwrap();
        assert_eq!(fast.size(), 1 << 30);
        assert!(matches!(
            fast.resolve(Access::Read, 0, 4096),
            Extent::Void { len: 4096 }
        ));
        let slow = open_null(&NullConfig {
            latency: Duration::from_millis(20),
            size: 1000,
            ..NullConfig::default()
        })
        .unwrap();
        assert_eq!(slow.size(), 1024);
        run(choice, async {
            write(&*fast, 512, &[9; 512]).await.unwrap();
            assert_eq!(read(&*fast, 512, 512).await.unwrap(), [0; 512]);
            let start = Instant::now();
            assert_eq!(read(&*slow, 0, 1024).await.unwrap(), [0; 1024]);
            assert!(start.elapsed() >= Duration::from_millis(20));
            let past = read(&*slow, 512, 1024).await.unwrap_err();
            assert_eq!(past.kind(), Kind::Invalid);
            assert_eq!(
                read(&*slow, u64::MAX, 512).await.unwrap_err().kind(),
                Kind::Invalid
            );
        });
    }
}

#[test]
fn a_file_of_an_odd_size_ends_in_zeroes_and_keeps_its_size() {
    for choice in BACKENDS {
        let dir = directory();
        let path = image(&dir, "odd.raw", &[5; 1000]);
        let node = open(&path);
        assert_eq!(node.size(), 1024);
        run(choice, async {
            let tail = read(&*node, 512, 512).await.unwrap();
            assert!(tail[..488] == [5; 488] && tail[488..] == [0; 24]);
            write(&*node, 990, &[6; 10]).await.unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 1000);
            write(&*node, 1020, &[7; 4]).await.unwrap();
            assert_eq!(read(&*node, 1000, 24).await.unwrap()[20..], [7; 4]);
            assert_eq!(
                write(&*node, 1020, &[7; 5]).await.unwrap_err().kind(),
                Kind::Invalid
            );
            node.flush().await.unwrap();
        });
    }
}

#[test]
fn an_empty_file_is_a_disk_of_no_bytes() {
    let dir = directory();
    let node = open(&image(&dir, "empty.raw", &[]));
    assert_eq!(node.size(), 0);
    run(BACKENDS[0], async {
        assert_eq!(read(&*node, 0, 0).await.unwrap(), []);
        assert_eq!(read(&*node, 0, 1).await.unwrap_err().kind(), Kind::Invalid);
        node.resize(4096, Resize::AtLeast, false).await.unwrap();
        assert_eq!(read(&*node, 0, 4096).await.unwrap(), [0; 4096]);
    });
}

#[test]
fn raw_shows_exactly_its_part() {
    for choice in BACKENDS {
        let dir = directory();
        let bytes = pattern(16_384, 1);
        let path = image(&dir, "parts.raw", &bytes);
        let file: Arc<dyn Node> = open(&path);
        let part = |offset, size| {
            let config = RawConfig {
                offset,
                size,
                ..RawConfig::default()
            };
            open_raw(Arc::clone(&file), &config)
        };
        let middle = part(1000, Some(2048)).unwrap();
        assert_eq!(middle.size(), 2048);
        let rest = part(4096, None).unwrap();
        assert_eq!(rest.size(), 12_288);
        run(choice, async {
            assert_eq!(read(&*middle, 0, 2048).await.unwrap(), bytes[1000..3048]);
            assert_eq!(
                read(&*middle, 2000, 49).await.unwrap_err().kind(),
                Kind::Invalid
            );
            let past = middle.write(2000, common::buffer(&[1; 49], 0)).await.0;
            assert_eq!(past.unwrap_err().kind(), Kind::Invalid);
            write(&*middle, 2047, &[0xAB]).await.unwrap();
            middle.write_zeroes(0, 10, Zeroes::MayUnmap).await.unwrap();
            let mut expected = bytes.clone();
            expected[3047] = 0xAB;
            expected[1000..1010].fill(0);
            assert_eq!(std::fs::read(&path).unwrap(), expected);
            // The one with a size of its own keeps it, the other takes the file with it.
            let fixed = middle
                .resize(4096, Resize::AtLeast, false)
                .await
                .unwrap_err();
            assert_eq!(fixed.kind(), Kind::Unsupported);
            rest.resize(20_480, Resize::AtLeast, false).await.unwrap();
            assert_eq!((rest.size(), file.size()), (20_480, 24_576));
        });
        for (offset, size) in [
            (0, Some(1000)),
            (1000, None),
            (30_000, None),
            (24_576, Some(512)),
        ] {
            assert_eq!(
                part(offset, size).err().map(|e| e.kind()),
                Some(Kind::Invalid)
            );
        }
        assert_eq!(
            part(u64::MAX, Some(512)).err().map(|e| e.kind()),
            Some(Kind::Invalid)
        );
        assert_eq!(part(24_576, None).unwrap().size(), 0);
    }
}

/// With O_NONBLOCK io_uring would answer EAGAIN instead of waiting for the disk.
#[test]
fn the_descriptor_waits_for_the_disk() {
    let dir = directory();
    let node = open(&image(&dir, "blocking.raw", &[1; 512]));
    let flags = rustix::fs::fcntl_getfl(node.host().fd()).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
}

fn refused(path: &Path) -> String {
    message(open_file(&file_config(path)))
}

#[test]
fn what_is_no_image_is_refused_with_what_to_do() {
    let dir = directory();
    let missing = dir.path().join("missing.raw");
    let shown = missing.display();
    let expected = format!("Could not open '{shown}': No such file or directory");
    assert_eq!(refused(&missing), expected);
    assert!(refused(dir.path()).contains("Is a directory"));
    let fifo = dir.path().join("fifo");
    must("mkfifo", &[fifo.to_str().unwrap()]);
    let shown = fifo.display();
    let expected = format!(
        "'file' driver requires '{shown}' to be a regular file (it is a fifo, which cannot hold a disk image)"
    );
    assert_eq!(refused(&fifo), expected);
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(refused(&socket).contains("it is a socket"));
    let expected = "'file' driver requires '/dev/null' to be a regular file (it is a character device, which cannot hold a disk image)";
    assert_eq!(refused(Path::new("/dev/null")), expected);
    let file = image(&dir, "file.raw", &[0; 512]);
    let said = message(open_host_device(&file_config(&file)));
    assert!(said.contains("use the driver 'file'"), "{said}");
    let device = common::Loop::new(&image(&dir, "device", &vec![0; 65_536]), 512);
    assert!(refused(&device.0).contains("use the driver 'host_device'"));
}

/// Root may open everything; a file on a read-only file system it may not write either.
#[test]
fn a_file_that_cannot_be_written_is_refused_or_opened_for_reading() {
    let dir = directory();
    let small = SmallDisk::new(&dir, 4 << 20);
    let path = small.mountpoint.join("ro.raw");
    std::fs::write(&path, [1; 512]).unwrap();
    let mountpoint = small.mountpoint.to_str().unwrap();
    must("mount", &["-o", "remount,ro", mountpoint]);
    let said = refused(&path);
    assert!(
        said.contains("Read-only file system") && said.contains("read-only=on"),
        "{said}"
    );
    let auto = FileConfig {
        auto_read_only: true,
        ..file_config(&path)
    };
    let node = open_file(&auto).unwrap();
    assert!(node.read_only());
    run(BACKENDS[0], async {
        assert_eq!(read(&*node, 0, 512).await.unwrap(), [1; 512]);
        assert_eq!(
            write(&*node, 0, &[2; 512]).await.unwrap_err().kind(),
            Kind::ReadOnly
        );
        let zero = node.write_zeroes(0, 512, Zeroes::Keep).await;
        assert_eq!(zero.unwrap_err().kind(), Kind::ReadOnly);
        let resized = node.resize(1024, Resize::Exactly, false).await;
        assert_eq!(resized.unwrap_err().kind(), Kind::ReadOnly);
        node.flush().await.unwrap();
    });
}

#[test]
fn an_unreadable_file_is_refused_to_those_who_may_not() {
    let dir = directory();
    let path = image(&dir, "secret.raw", &[1; 512]);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    let node = open_file(&file_config(&path));
    // Root overrides modes; anybody else gets the message.
    match node {
        Ok(_) => assert!(rustix::process::geteuid().is_root()),
        Err(error) => assert!(error.to_string().contains("Permission denied"), "{error}"),
    }
}
