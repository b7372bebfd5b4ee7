//! Memory of a copy: scratch buffers a thread, and what one direction could not write at once.

use std::cell::RefCell;

/// Bytes moved at most by one read. Four TLS records fill it, so that one write to the other side
/// carries several; larger gains nothing, because a socket's receive queue rarely holds more.
pub const SCRATCH: usize = 64 * 1024;

type Buffer = RefCell<Box<[u8]>>;

fn empty() -> Buffer {
    RefCell::new(vec![0; SCRATCH].into_boxed_slice())
}

thread_local! {
    static PLAIN: Buffer = empty();
    static WIRE: Buffer = empty();
}

/// Lends the thread's buffer for application bytes to `work`, which must not keep bytes in it past
/// its return.
pub(super) fn with_scratch<R>(work: impl FnOnce(&mut [u8]) -> R) -> R {
    PLAIN.with(|buffer| lend(buffer, work))
}

/// The same for TLS records.
pub(super) fn with_wire<R>(work: impl FnOnce(&mut [u8]) -> R) -> R {
    WIRE.with(|buffer| lend(buffer, work))
}

fn lend<R>(buffer: &Buffer, work: impl FnOnce(&mut [u8]) -> R) -> R {
    match buffer.try_borrow_mut() {
        Ok(mut buffer) => work(&mut buffer),
        // A stream whose poll runs another relay on the same stack would find it lent already.
        Err(_) => work(&mut vec![0; SCRATCH]),
    }
}

/// What was read but could not be written yet: at most [`SCRATCH`] bytes, no memory when empty.
#[derive(Default)]
pub(super) struct Kept {
    bytes: Vec<u8>,
    written: usize,
}

impl Kept {
    /// Takes over what a write left. The buffer must be empty.
    pub(super) fn keep(&mut self, rest: &[u8]) {
        debug_assert!(self.is_empty() && rest.len() <= SCRATCH);
        self.bytes = rest.to_vec();
        self.written = 0;
    }

    pub(super) fn rest(&self) -> &[u8] {
        &self.bytes[self.written..]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    /// `count` bytes were written; gives the memory back with the last one.
    pub(super) fn advance(&mut self, count: usize) {
        self.written += count;
        if self.is_empty() {
            self.bytes = Vec::new();
            self.written = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_with_the_last_byte() {
        let mut kept = Kept::default();
        kept.keep(b"abcdef");
        kept.advance(4);
        assert_eq!(kept.rest(), b"ef");
        assert!(kept.bytes.capacity() > 0);
        kept.advance(2);
        assert!(kept.is_empty());
        assert_eq!(kept.bytes.capacity(), 0);
    }

    #[test]
    fn nested_use_gets_a_buffer_of_its_own() {
        with_scratch(|outer| {
            outer[0] = 7;
            with_scratch(|inner| inner[0] = 9);
            assert_eq!(outer[0], 7);
        });
    }
}
