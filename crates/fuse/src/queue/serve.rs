//! One slot's task: wait for a request, do it, answer it, again.

use std::rc::Rc;

use super::pending::Pending;
use super::slots::{SMALL, Slot};
use crate::latency::RequestKind;
use crate::ops;
use crate::queue::Queue;
use crate::request::{Operation, Request};

/// Serves the requests of one slot until the queue is gone.
pub(super) async fn run(queue: Rc<Queue>, slot: Rc<Slot>) {
    while let Some(request) = slot.assigned().await {
        let Request {
            unique, operation, ..
        } = request;
        let entry = slot.entry();
        let device = entry.is_none().then_some(&queue.device);
        let pending = Pending::new(device, unique);
        let mut memory = slot.take_memory();
        let answer = ops::perform(&queue, &mut memory, request).await;
        let greeted = matches!((operation, &answer), (Operation::Init { .. }, Ok(_)));
        queue.note_time(RequestKind::of(&operation), slot.arrived());
        let (header, len) = pending.header(answer);
        if let Some(entry) = entry {
            queue.replying();
            queue.commit(entry, memory, &header, len);
            queue.freed(&slot);
            continue;
        }
        let reply = memory.take_for_reply(&header, len);
        // Whoever started the export waits for the greeting, and large memory for being given back.
        let urgent = queue.replying() || greeted || memory.touched() > SMALL;
        let (sent, reply) = diskfuse_ring::write_now(&queue.device, reply, urgent).await;
        memory.put(reply);
        slot.put_memory(memory);
        queue.answered(&slot, &sent);
        if greeted {
            queue.shared.introduced(&queue.device);
        }
    }
}
