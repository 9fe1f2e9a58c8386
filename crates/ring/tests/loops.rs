//! What a ring promises, on both of its backends: every test runs on each of them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use diskfuse_ring::{
    Backend, Buf, Choice, Command, CommandSink, Config, IoThread, PAGE, Polling, Ring, SharedFd,
    cancel, carries_commands, command, command_again, end_commands, fallocate, fdatasync, offload,
    poll, pool_read_at, read_at, read_now, read_ready, readv_at, release_command_memory, sleep,
    spawn, write_at, write_now, writev_at,
};

fn on_both(test: impl Fn(Ring)) {
    for choice in [Choice::Uring, Choice::Epoll] {
        let config = Config {
            choice,
            ..Config::default()
        };
        test(Ring::new(&config).unwrap());
    }
}

fn temp_file() -> SharedFd {
    SharedFd::from(tempfile::tempfile().unwrap())
}

fn filled(len: usize, byte: u8) -> Buf {
    let mut buf = Buf::new(len).unwrap();
    buf.as_mut_slice().fill(byte);
    buf
}

fn pipe() -> (SharedFd, SharedFd) {
    let flags = rustix::pipe::PipeFlags::NONBLOCK | rustix::pipe::PipeFlags::CLOEXEC;
    let (r, w): (OwnedFd, OwnedFd) = rustix::pipe::pipe_with(flags).unwrap();
    (SharedFd::new(r), SharedFd::new(w))
}

/// Resolves to `None` if `future` takes longer than ten seconds.
async fn soon<F: Future>(future: F) -> Option<F::Output> {
    let mut future = Box::pin(future);
    let mut limit = Box::pin(sleep(Duration::from_secs(10)));
    std::future::poll_fn(move |cx| {
        if let std::task::Poll::Ready(out) = future.as_mut().poll(cx) {
            return std::task::Poll::Ready(Some(out));
        }
        limit.as_mut().poll(cx).map(|()| None)
    })
    .await
}

#[test]
fn the_backend_is_what_was_asked_for() {
    let of = |choice| {
        Ring::new(&Config {
            choice,
            ..Config::default()
        })
        .unwrap()
        .backend()
    };
    assert_eq!(of(Choice::Uring), Backend::Uring);
    assert_eq!(of(Choice::Epoll), Backend::Epoll);
}

#[test]
fn what_was_written_is_read_back() {
    on_both(|ring| {
        ring.block_on(async {
            let fd = temp_file();
            let (n, buf) = write_at(&fd, filled(8192, 0xa5), 4096).await;
            assert_eq!(n.unwrap(), 8192);
            fdatasync(&fd).await.unwrap();
            let (n, buf) = read_at(&fd, buf.with_window(0..4096), 8192).await;
            assert_eq!(n.unwrap(), 4096);
            assert!(buf.as_slice().iter().all(|&b| b == 0xa5));
            let (n, _) = pool_read_at(&fd, buf, 1 << 40).await;
            assert_eq!(n.unwrap(), 0, "past the end");
        });
    });
}

#[test]
fn vectors_are_moved_in_order() {
    on_both(|ring| {
        ring.block_on(async {
            let fd = temp_file();
            let (n, _) = writev_at(&fd, vec![filled(512, 1), filled(1024, 2)], 0).await;
            assert_eq!(n.unwrap(), 1536);
            let (n, bufs) = readv_at(&fd, vec![filled(100, 0), filled(1436, 0)], 0).await;
            assert_eq!(n.unwrap(), 1536);
            assert!(bufs[0].as_slice().iter().all(|&b| b == 1));
            assert_eq!(&bufs[1].as_slice()[410..414], &[1, 1, 2, 2]);
        });
    });
}

#[test]
fn errors_carry_the_kernels_number() {
    on_both(|ring| {
        ring.block_on(async {
            let fd = SharedFd::from(std::fs::File::open("/").unwrap());
            let (n, _) = read_at(&fd, filled(512, 0), 0).await;
            assert_eq!(n.unwrap_err().raw_os_error(), Some(libc::EISDIR));
            let err = fallocate(&temp_file(), 0, 0, 0).await.unwrap_err();
            assert_eq!(err.raw_os_error(), Some(libc::EINVAL));
        });
    });
}

#[test]
fn many_operations_are_in_flight_at_once() {
    on_both(|ring| {
        ring.block_on(async {
            let fd = temp_file();
            let writes: Vec<_> = (0..600u64)
                .map(|i| write_at(&fd, filled(512, i as u8), i * 512))
                .collect();
            for write in writes {
                assert_eq!(write.await.0.unwrap(), 512);
            }
            let (n, buf) = read_at(&fd, filled(600 * 512, 0), 0).await;
            assert_eq!(n.unwrap(), 600 * 512);
            for (i, sector) in buf.as_slice().chunks(512).enumerate() {
                assert!(sector.iter().all(|&b| b == i as u8), "sector {i}");
            }
        });
    });
}

#[test]
fn a_ready_read_waits_and_a_read_now_does_not() {
    on_both(|ring| {
        ring.block_on(async {
            let (r, w) = pipe();
            let mut buf = filled(64, 0);
            let error = read_now(&r, &mut buf).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
            let waiting = read_ready(&r, buf);
            let writer = spawn(async move {
                sleep(Duration::from_millis(20)).await;
                let (n, _) = write_now(&w, filled(5, b'x'), true).await;
                assert_eq!(n.unwrap(), 5);
                w
            });
            let (n, buf) = soon(waiting).await.expect("woken by the write");
            assert_eq!(n.unwrap(), 5);
            assert_eq!(&buf.as_slice()[..5], b"xxxxx");
            writer.await;
        });
    });
}

#[test]
fn cancelling_answers_the_waiter() {
    on_both(|ring| {
        ring.block_on(async {
            let (r, _w) = pipe();
            let waiting = read_ready(&r, filled(64, 0));
            let key = waiting.key();
            spawn(async move {
                sleep(Duration::from_millis(5)).await;
                cancel(key);
            });
            let (n, _) = soon(waiting).await.expect("cancelled");
            assert_eq!(n.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
            let polling = poll(&r, libc::POLLIN as u32);
            cancel(polling.key());
            let err = soon(polling).await.expect("cancelled").unwrap_err();
            assert_eq!(err.raw_os_error(), Some(libc::ECANCELED));
        });
    });
}

#[test]
fn a_dropped_ring_waits_for_what_is_in_flight_and_ends() {
    on_both(|ring| {
        let (r, w) = pipe();
        ring.block_on(async {
            let fd = temp_file();
            drop(read_ready(&r, filled(64, 0)));
            drop(write_at(&fd, filled(1 << 20, 3), 0));
            spawn(async move {
                std::future::pending::<()>().await;
            });
        });
        let start = Instant::now();
        drop(ring);
        assert!(start.elapsed() < Duration::from_secs(5));
        drop(w);
    });
}

#[test]
fn mail_wakes_a_sleeping_loop() {
    for choice in [Choice::Uring, Choice::Epoll] {
        let thread = IoThread::spawn(
            "test",
            Config {
                choice,
                ..Config::default()
            },
        )
        .unwrap();
        std::thread::sleep(Duration::from_millis(20));
        for i in 0..1000 {
            let reply = thread.mailbox().call(move || async move { i + 1 });
            let Ok(answer) = reply.wait_for(Duration::from_secs(5)) else {
                panic!("no answer to letter {i}")
            };
            assert_eq!(answer.unwrap(), i + 1);
        }
        let mailbox = thread.mailbox().clone();
        drop(thread);
        assert!(mailbox.post(|| ()).is_err(), "an ended ring refuses mail");
        assert!(mailbox.call(|| async {}).wait().is_err());
    }
}

#[test]
fn blocking_work_does_not_block_the_loop() {
    on_both(|ring| {
        ring.block_on(async {
            let ticks = Arc::new(AtomicU32::new(0));
            let theirs = Arc::clone(&ticks);
            // It goes on until the loop has, which it could not if the loop waited for it.
            let slow = offload(move || {
                let end = Instant::now() + Duration::from_secs(10);
                while theirs.load(Ordering::SeqCst) < 3 && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(1));
                }
                theirs.load(Ordering::SeqCst)
            });
            spawn(async move {
                loop {
                    sleep(Duration::from_millis(5)).await;
                    ticks.fetch_add(1, Ordering::SeqCst);
                }
            });
            assert!(slow.await.unwrap() >= 3, "the loop stood still");
        });
    });
}

#[test]
fn sleeps_end_in_order_and_never_early() {
    on_both(|ring| {
        ring.block_on(async {
            let log = Rc::new(RefCell::new(Vec::new()));
            let start = Instant::now();
            let tasks: Vec<_> = [30u64, 10, 20]
                .into_iter()
                .map(|ms| {
                    let log = Rc::clone(&log);
                    spawn(async move {
                        sleep(Duration::from_millis(ms)).await;
                        assert!(start.elapsed() >= Duration::from_millis(ms));
                        log.borrow_mut().push(ms);
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            assert_eq!(*log.borrow(), [10, 20, 30]);
        });
    });
}

#[test]
fn a_polling_loop_answers_and_sleeps_when_idle() {
    for choice in [Choice::Uring, Choice::Epoll] {
        let polling = Polling {
            max: Duration::from_micros(200),
            grow: 0,
            shrink: 0,
        };
        let thread = IoThread::spawn("spin", Config { choice, polling }).unwrap();
        for _ in 0..2000 {
            thread.mailbox().call(|| async {}).wait().unwrap();
        }
        let cpu = || {
            let path = format!(
                "/proc/self/task/{}/schedstat",
                thread
                    .mailbox()
                    .call(|| async { rustix::thread::gettid().as_raw_nonzero() })
                    .wait()
                    .unwrap()
            );
            let text = std::fs::read_to_string(path).unwrap();
            text.split(' ').next().unwrap().parse::<u64>().unwrap()
        };
        let before = cpu();
        std::thread::sleep(Duration::from_millis(300));
        assert!(cpu() - before < 20_000_000, "an idle loop burns the CPU");
    }
}

#[test]
fn one_turn_hands_over_everything_it_started() {
    let ring = Ring::new(&Config {
        choice: Choice::Uring,
        ..Config::default()
    })
    .unwrap();
    ring.block_on(async {
        let fd = temp_file();
        write_at(&fd, filled(64 * PAGE, 1), 0).await.0.unwrap();
        let before = diskfuse_ring::counters();
        let reads: Vec<_> = (0..64u64)
            .map(|i| read_at(&fd, filled(PAGE, 0), i * PAGE as u64))
            .collect();
        for read in reads {
            assert_eq!(read.await.0.unwrap(), PAGE);
        }
        let after = diskfuse_ring::counters();
        assert_eq!(after.operations - before.operations, 64);
        assert!(
            after.enters - before.enters <= 4,
            "{} system calls for 64 reads",
            after.enters - before.enters
        );
    });
}

#[test]
fn an_unhurried_write_is_done_at_once_and_answered_with_the_next_event_or_when_hurried() {
    on_both(|ring| {
        ring.block_on(async {
            let (r, w) = pipe();
            let write = write_now(&w, filled(5, b'x'), false);
            let (n, _) = soon(read_ready(&r, filled(64, 0))).await.expect("written");
            assert_eq!(n.unwrap(), 5);
            assert_eq!(soon(write).await.expect("answered").0.unwrap(), 5);
            let write = write_now(&w, filled(6, b'y'), false);
            diskfuse_ring::hurry();
            assert_eq!(soon(write).await.expect("hurried").0.unwrap(), 6);
        });
    });
}

#[test]
fn a_wait_that_lost_the_race_for_its_bytes_can_still_be_cancelled() {
    on_both(|ring| {
        ring.block_on(async {
            for _ in 0..20 {
                let (r, w) = pipe();
                let waiting = read_ready(&r, filled(64, 0));
                let key = waiting.key();
                diskfuse_ring::yield_now().await;
                // Between the wake-up and the read, which the loop's next turn does, somebody else takes the byte.
                rustix::io::write(&w, b"x").unwrap();
                rustix::io::read(&r, &mut [0; 1]).unwrap();
                diskfuse_ring::yield_now().await;
                cancel(key);
                let (n, _) = soon(waiting).await.expect("answered");
                let errno = n.unwrap_err().raw_os_error();
                assert!(
                    matches!(errno, Some(libc::ECANCELED | libc::EAGAIN)),
                    "{errno:?}"
                );
            }
        });
    });
}

/// Collects what commands were answered.
#[derive(Default)]
struct Answers(RefCell<Vec<(u32, i32, Buf)>>);

impl CommandSink for Answers {
    fn completed(&self, name: u32, result: i32, buf: Buf) {
        self.0.borrow_mut().push((name, result, buf));
    }
}

impl Answers {
    async fn next(&self) -> (u32, i32, Buf) {
        let wait = async {
            loop {
                if let Some(answer) = self.0.borrow_mut().pop() {
                    return answer;
                }
                sleep(Duration::from_millis(1)).await;
            }
        };
        soon(wait).await.expect("an answer")
    }
}

#[test]
fn commands_are_answered_with_their_memory_where_the_ring_carries_them_and_refused_elsewhere() {
    on_both(|ring| {
        let carries = ring.backend() == Backend::Uring;
        ring.block_on(async {
            assert_eq!(carries_commands(), carries);
            // /dev/null takes any command and does nothing.
            let null = SharedFd::from(std::fs::File::open("/dev/null").unwrap());
            let answers = Rc::new(Answers::default());
            let order = Command {
                op: 1,
                arguments: [0; 24],
                memory: None,
            };
            let sink = Rc::downgrade(&answers) as std::rc::Weak<dyn CommandSink>;
            let key = command(&null, order, filled(PAGE, 3), sink.clone(), 7);
            let (name, result, buf) = answers.next().await;
            let expected = if carries { 0 } else { -libc::ENOSYS };
            assert_eq!((name, result), (7, expected));
            assert!(buf.as_slice().iter().all(|&byte| byte == 3));
            if carries {
                command_again(key, order, buf);
                assert_eq!(answers.next().await.0, 7);
                end_commands(key);
                assert!(!release_command_memory(key, 0), "nothing is in flight");
            }
            // One whose sink is gone by then is answered to nobody.
            command(&null, order, filled(PAGE, 4), sink, 8);
            drop(answers);
            sleep(Duration::from_millis(5)).await;
        });
    });
}
