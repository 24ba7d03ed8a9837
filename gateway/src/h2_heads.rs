//! Watches the HTTP/2 frames that arrive for a header block that never ends.
//!
//! The rule: it follows frame lengths alone (RFC 9113, section 4.1) and judges nothing else; h2 does.
//! h2 bounds a block's size, not its time, and its idle limit does not run beside other streams.

/// The client's preface before its first frame.
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

#[derive(Debug)]
pub struct HeadWatch {
    /// Bytes to skip: the preface, or what is left of a frame's payload.
    skip: usize,
    header: [u8; FRAME_HEADER],
    filled: usize,
    /// The frame in `skip` belongs to a header block.
    in_block: bool,
    /// The block goes on after that frame.
    continues: bool,
    started: bool,
}

impl Default for HeadWatch {
    fn default() -> Self {
        Self { skip: PREFACE, header: [0; FRAME_HEADER], filled: 0, in_block: false, continues: false, started: false }
    }
}

impl HeadWatch {
    /// Follows the next bytes on the wire.
    pub fn see(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let skipped = self.skip.min(bytes.len());
                self.skip -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            self.started = true;
            let taken = (FRAME_HEADER - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
            self.filled += taken;
            bytes = &bytes[taken..];
            if self.filled == FRAME_HEADER {
                self.begin_frame();
            }
        }
        if self.skip == 0 && !self.continues {
            self.in_block = false;
        }
    }

    /// Whether the preface, a header block or a frame's header has begun and not ended.
    pub fn is_open(&self) -> bool {
        !self.started || self.filled > 0 || self.in_block || self.continues
    }

    fn begin_frame(&mut self) {
        self.filled = 0;
        let [high, middle, low, kind, flags, ..] = self.header;
        self.skip = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        self.in_block = matches!(kind, HEADERS | CONTINUATION);
        if self.in_block {
            self.continues = flags & END_HEADERS == 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut wire = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        wire.extend(vec![b'x'; usize::from(length)]);
        wire
    }

    fn started() -> HeadWatch {
        let mut watch = HeadWatch::default();
        watch.see(&[b'P'; PREFACE]);
        watch.see(&frame(4, 0, 0));
        watch
    }

    #[test]
    fn a_block_is_open_until_its_last_byte() {
        let mut watch = started();
        assert!(!watch.is_open());
        let headers = frame(HEADERS, END_HEADERS, 20);
        for piece in &headers[..headers.len() - 1] {
            watch.see(&[*piece]);
            assert!(watch.is_open());
        }
        watch.see(&headers[headers.len() - 1..]);
        assert!(!watch.is_open());
    }

    #[test]
    fn a_block_goes_on_over_continuations() {
        let mut watch = started();
        watch.see(&frame(HEADERS, 0, 3));
        assert!(watch.is_open());
        watch.see(&frame(CONTINUATION, 0, 3));
        assert!(watch.is_open());
        watch.see(&frame(CONTINUATION, END_HEADERS, 3));
        assert!(!watch.is_open());
    }

    #[test]
    fn data_in_flight_is_not_a_head() {
        let mut watch = started();
        watch.see(&frame(0, 0, 200)[..50]);
        assert!(!watch.is_open());
    }

    #[test]
    fn a_silent_peer_is_open_from_the_start() {
        assert!(HeadWatch::default().is_open());
    }
}
