//! Watches the HTTP/2 frames that arrive: for a header block that never ends, and for a flood.
//!
//! The rule: it follows frame headers alone (RFC 9113, section 4.1) and judges nothing else; h2 does.
//! h2 bounds a block's size, not its time, and it bounds no frames that cost us work and carry nothing.

use std::time::{Duration, Instant};

/// The client's preface before its first frame.
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// What may be spent in [`BUDGET_TIME`], in the units of [`cost`]: 2,000 SETTINGS, PRIORITY,
/// RST_STREAM, unknown or empty DATA frames, 10,000 PINGs, or 20,000 of the cheap ones. A client that
/// pings for each answer to learn its window, as gRPC's do, stays below on any link.
const BUDGET: u32 = 20_000;
const BUDGET_TIME: Duration = Duration::from_secs(1);
/// A request earns what honest clients send beside it: a PING and two WINDOW_UPDATEs.
const EARNED: u32 = 4;
/// A DATA frame that carries less is worth counting.
const TINY: usize = 16;
/// What padding can make of nothing (section 6.1).
const MOST_PADDING: usize = 256;

#[derive(Debug)]
pub struct FrameWatch {
    /// Bytes to skip: the preface, or what is left of a frame's payload.
    skip: usize,
    header: [u8; FRAME_HEADER],
    filled: usize,
    /// The frame in `skip` belongs to a header block.
    in_block: bool,
    /// The block goes on after that frame.
    continues: bool,
    started: bool,
    spent: u32,
    /// When the first of `spent` was spent.
    since: Option<Instant>,
    flood: bool,
}

impl Default for FrameWatch {
    fn default() -> Self {
        Self {
            skip: PREFACE,
            header: [0; FRAME_HEADER],
            filled: 0,
            in_block: false,
            continues: false,
            started: false,
            spent: 0,
            since: None,
            flood: false,
        }
    }
}

impl FrameWatch {
    /// Follows the next bytes on the wire. The clock is read only when a budget begins or ends.
    pub fn see(&mut self, mut bytes: &[u8], now: impl Fn() -> Instant) {
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
                self.begin_frame(&now);
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

    /// Whether anything came.
    pub fn has_begun(&self) -> bool {
        self.started || self.skip != PREFACE
    }

    /// Whether more came than a client has use for. Stays so.
    pub fn is_flood(&self) -> bool {
        self.flood
    }

    fn begin_frame(&mut self, now: &impl Fn() -> Instant) {
        self.filled = 0;
        let [high, middle, low, kind, flags, ..] = self.header;
        self.skip = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        self.in_block = matches!(kind, HEADERS | CONTINUATION);
        if self.in_block {
            self.continues = flags & END_HEADERS == 0;
        }
        match cost(kind, flags, self.skip) {
            0 => {}
            cost => self.spend(cost, now),
        }
        if kind == HEADERS {
            self.spent = self.spent.saturating_sub(EARNED);
        }
    }

    fn spend(&mut self, cost: u32, now: &impl Fn() -> Instant) {
        if self.spent == 0 {
            self.since = Some(now());
        }
        self.spent += cost;
        if self.spent >= BUDGET {
            let took = self.since.map_or(Duration::ZERO, |since| now().saturating_duration_since(since));
            self.flood |= took < BUDGET_TIME;
            self.spent = 0;
        }
    }
}

/// What a frame takes from the budget. What h2 bounds itself costs nothing: streams at a time, the size
/// of header blocks and the CONTINUATIONs of one.
fn cost(kind: u8, flags: u8, length: usize) -> u32 {
    match kind {
        // Many clients end a request with an empty frame.
        DATA if flags & END_STREAM != 0 => 0,
        DATA => {
            let padding = if flags & PADDED != 0 { MOST_PADDING } else { 0 };
            match length.saturating_sub(padding) {
                0 => 10,
                1..TINY => 1,
                _ => 0,
            }
        }
        HEADERS | CONTINUATION => 0,
        WINDOW_UPDATE => 1,
        PING => 2,
        _ => 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: u8 = 4;
    const RST_STREAM: u8 = 3;

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut wire = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        wire.extend(vec![b'x'; usize::from(length)]);
        wire
    }

    fn started() -> FrameWatch {
        let mut watch = FrameWatch::default();
        watch.see(&[b'P'; PREFACE], Instant::now);
        watch.see(&frame(SETTINGS, 0, 0), Instant::now);
        watch
    }

    /// Sees these frames over and over, one round each `pause`; how many rounds until it is a flood.
    fn rounds(frames: &[(u8, u8, u8)], pause: Duration) -> Option<usize> {
        let mut watch = started();
        let mut now = Instant::now();
        let wire: Vec<u8> = frames.iter().flat_map(|(kind, flags, length)| frame(*kind, *flags, *length)).collect();
        (1..=50_000).find(|_| {
            now += pause;
            watch.see(&wire, || now);
            watch.is_flood()
        })
    }

    #[test]
    fn a_block_is_open_until_its_last_byte() {
        let mut watch = started();
        assert!(!watch.is_open());
        let headers = frame(HEADERS, END_HEADERS, 20);
        for piece in &headers[..headers.len() - 1] {
            watch.see(&[*piece], Instant::now);
            assert!(watch.is_open());
        }
        watch.see(&headers[headers.len() - 1..], Instant::now);
        assert!(!watch.is_open());
    }

    #[test]
    fn a_block_goes_on_over_continuations() {
        let mut watch = started();
        watch.see(&frame(HEADERS, 0, 3), Instant::now);
        assert!(watch.is_open());
        watch.see(&frame(CONTINUATION, 0, 3), Instant::now);
        assert!(watch.is_open());
        watch.see(&frame(CONTINUATION, END_HEADERS, 3), Instant::now);
        assert!(!watch.is_open());
    }

    #[test]
    fn data_in_flight_is_not_a_head() {
        let mut watch = started();
        watch.see(&frame(DATA, 0, 200)[..50], Instant::now);
        assert!(!watch.is_open());
    }

    #[test]
    fn a_silent_peer_is_open_from_the_start() {
        assert!(FrameWatch::default().is_open());
    }

    #[test]
    fn t29_a_flood_is_seen_within_its_budget() {
        let quick = Duration::from_micros(10);
        let request = (HEADERS, END_HEADERS, 20);
        for (what, frames, most) in [
            ("settings", &[(SETTINGS, 0, 6)][..], 2_000),
            ("pings", &[(PING, 0, 8)], 10_000),
            ("priorities", &[(2, 0, 5)], 2_000),
            ("frames of no known kind", &[(0xbe, 0, 0)], 2_000),
            ("window updates", &[(WINDOW_UPDATE, 0, 4)], 20_000),
            ("empty data", &[(DATA, 0, 0)], 2_000),
            ("padding alone", &[(DATA, PADDED, 255)], 2_000),
            ("tiny data", &[(DATA, 0, 1)], 20_000),
            ("requests that are reset at once", &[request, (RST_STREAM, 0, 4)], 3_400),
        ] {
            let seen = rounds(frames, quick).unwrap_or_else(|| panic!("{what} are no flood"));
            assert!(seen <= most, "{what}: {seen}");
        }
    }

    #[test]
    fn what_honest_clients_send_is_no_flood() {
        let quick = Duration::from_micros(10);
        let request = (HEADERS, END_HEADERS, 20);
        let end = (DATA, END_STREAM, 0);
        for (what, frames, pause) in [
            ("requests", &[request, (DATA, 0, 200), end][..], quick),
            (
                "a ping and two updates for each",
                &[request, end, (PING, 0, 8), (WINDOW_UPDATE, 0, 4), (WINDOW_UPDATE, 0, 4)],
                quick,
            ),
            ("a large body", &[(DATA, 0, 255)], quick),
            ("1,000 requests a second given up", &[request, (RST_STREAM, 0, 4)], Duration::from_millis(1)),
            ("updates for a large answer", &[(WINDOW_UPDATE, 0, 4)], Duration::from_micros(60)),
            ("100 settings a second", &[(SETTINGS, 0, 6)], Duration::from_millis(10)),
        ] {
            assert_eq!(rounds(frames, pause), None, "{what}");
        }
    }
}
