//! HTTP/2 frames by hand (RFC 9113, section 4.1), with headers that no encoder would write.

/// What opens a connection: the preface and empty SETTINGS.
pub fn opening() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[])].concat()
}

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short payload").to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Headers as HPACK literals that are never indexed and not compressed.
pub fn block(headers: &[(&str, &str)]) -> Vec<u8> {
    let text = |text: &str, into: &mut Vec<u8>| {
        // An integer of 7 bits (RFC 7541, section 5.1).
        let mut length = text.len();
        if length < 127 {
            into.push(u8::try_from(length).expect("less than 127"));
        } else {
            into.push(127);
            length -= 127;
            while length >= 128 {
                into.push(u8::try_from(length % 128).expect("less than 128") | 128);
                length /= 128;
            }
            into.push(u8::try_from(length).expect("less than 128"));
        }
        into.extend(text.as_bytes());
    };
    let mut bytes = Vec::new();
    for (name, value) in headers {
        bytes.push(0x10);
        text(name, &mut bytes);
        text(value, &mut bytes);
    }
    bytes
}

/// One frame that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The error code of RST_STREAM or GOAWAY.
    pub fn error(&self) -> Option<u32> {
        let at = match self.kind {
            RST_STREAM => 0,
            GOAWAY => 4,
            _ => return None,
        };
        Some(u32::from_be_bytes(self.payload.get(at..at + 4)?.try_into().ok()?))
    }
}

/// Cuts what came back into frames; a last one that is not whole is left out.
pub fn frames(mut bytes: &[u8]) -> Vec<Frame> {
    let mut found = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let Some((payload, rest)) = rest.split_at_checked(length) else { break };
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
        found.push(Frame { kind: head[3], stream, payload: payload.to_vec() });
        bytes = rest;
    }
    found
}
