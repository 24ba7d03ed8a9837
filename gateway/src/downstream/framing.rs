//! HTTP/1.1 framing, read strictly: where a request head ends, where its body ends, or why not.
//!
//! The rule: what two parsers could read differently is refused (RFC 9112, sections 2.2, 5.1, 5.2, 6.1,
//! 6.3). Nothing is repaired. Pingora parses only what passed here, one request at a time, so bytes
//! behind a request are never taken for a part of it. No I/O here.

use crate::errors::HeadFault;

/// Bytes of a request head.
pub const MAX_HEAD: usize = 60 << 10;
/// Header lines of a request.
pub const MAX_HEADERS: usize = 100;
/// Chunks of one body.
pub const MAX_CHUNKS: u32 = 65_536;
/// Bytes of a chunk-size line, extensions included.
const MAX_CHUNK_LINE: u32 = 128;
/// Bytes of all trailers.
const MAX_TRAILERS: u32 = 4 << 10;

/// Finds the end of a head that arrives in pieces. A fault is found as soon as its byte is there.
#[derive(Debug, Default)]
pub struct HeadScan {
    at: usize,
    line: usize,
    lines: usize,
}

impl HeadScan {
    /// Looks at what is new in `buffer`, which begins with the head. The length of the whole head, its
    /// empty line included, once that is there.
    pub fn scan(&mut self, buffer: &[u8]) -> Result<Option<usize>, HeadFault> {
        while let Some(&byte) = buffer.get(self.at) {
            if byte == b'\n' {
                if self.at == self.line || buffer[self.at - 1] != b'\r' {
                    return Err(HeadFault::BareLineFeed);
                }
                let empty = self.at == self.line + 1;
                if empty && self.lines == 0 {
                    return Err(HeadFault::RequestLine);
                }
                self.at += 1;
                self.line = self.at;
                if empty {
                    return Ok(Some(self.at));
                }
                self.lines += 1;
                if self.lines > MAX_HEADERS + 1 {
                    return Err(HeadFault::TooManyHeaders);
                }
            } else {
                self.at += 1;
            }
            if self.at > MAX_HEAD {
                return Err(HeadFault::TooLarge);
            }
        }
        Ok(None)
    }
}

/// How the body of a checked head is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLength {
    Declared(u64),
    Chunked,
}

/// Checks a whole head, from the request line to its empty line.
pub fn check_head(head: &[u8]) -> Result<BodyLength, HeadFault> {
    let head = head.strip_suffix(b"\r\n\r\n").ok_or(HeadFault::RequestLine)?;
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let old = check_request_line(lines.next().unwrap_or_default())?;
    let (mut length, mut coded, mut hosts) = (None, false, 0);
    for line in lines {
        let (name, value) = split_header(line)?;
        if name.eq_ignore_ascii_case(b"content-length") {
            if length.is_some() {
                return Err(HeadFault::ContentLength);
            }
            length = Some(whole_number(value).ok_or(HeadFault::ContentLength)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if coded || old || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(HeadFault::TransferEncoding);
            }
            coded = true;
        } else if name.eq_ignore_ascii_case(b"host") {
            hosts += 1;
        }
    }
    if hosts != 1 {
        return Err(HeadFault::Host);
    }
    match (length, coded) {
        (Some(_), true) => Err(HeadFault::BothLengths),
        (None, true) => Ok(BodyLength::Chunked),
        (length, false) => Ok(BodyLength::Declared(length.unwrap_or(0))),
    }
}

/// Whether it is HTTP/1.0.
fn check_request_line(line: &[u8]) -> Result<bool, HeadFault> {
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(HeadFault::RequestLine);
    };
    let visible = |byte: &u8| (0x21..0x7f).contains(byte);
    if method.is_empty() || !method.iter().all(u8::is_ascii_uppercase) || !target.iter().all(visible) {
        return Err(HeadFault::RequestLine);
    }
    // Origin form alone: the other forms name a server, and we are not a proxy to others.
    if target.first() != Some(&b'/') {
        return Err(HeadFault::RequestLine);
    }
    match version {
        b"HTTP/1.1" => Ok(false),
        b"HTTP/1.0" => Ok(true),
        _ => Err(HeadFault::RequestLine),
    }
}

fn split_header(line: &[u8]) -> Result<(&[u8], &[u8]), HeadFault> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(HeadFault::ObsoleteFold);
    }
    let colon = line.iter().position(|byte| *byte == b':').ok_or(HeadFault::HeaderName)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if matches!(name.last(), Some(b' ' | b'\t')) {
        return Err(HeadFault::SpaceBeforeColon);
    }
    if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
        return Err(HeadFault::HeaderName);
    }
    if value.iter().any(|byte| matches!(byte, 0..=8 | 10..=31 | 127)) {
        return Err(HeadFault::HeaderValue);
    }
    Ok((name, value.trim_ascii()))
}

/// `tchar` of RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn whole_number(text: &[u8]) -> Option<u64> {
    let plausible = !text.is_empty() && text.len() <= 18 && text.iter().all(u8::is_ascii_digit);
    plausible.then(|| text.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

/// Says which of the bytes on the wire belong to the body of the current request.
#[derive(Debug)]
pub enum Body {
    Declared(u64),
    Chunked(Chunks),
}

impl Body {
    pub fn new(length: BodyLength) -> Self {
        match length {
            BodyLength::Declared(length) => Self::Declared(length),
            BodyLength::Chunked => Self::Chunked(Chunks { state: Chunk::Size, size: 0, digits: 0, line: 0, chunks: 0 }),
        }
    }

    pub fn is_done(&self) -> bool {
        match self {
            Self::Declared(left) => *left == 0,
            Self::Chunked(chunks) => chunks.state == Chunk::Done,
        }
    }

    /// How many of these next bytes belong to the body.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, HeadFault> {
        match self {
            Self::Declared(left) => {
                let taken = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                *left -= taken as u64;
                Ok(taken)
            }
            Self::Chunked(chunks) => chunks.take(bytes),
        }
    }
}

/// The chunked coding (RFC 9112, section 7.1), followed byte by byte.
///
/// ```text
/// Size -> Extension? -> SizeEnd -> Data -> DataCr -> DataLf -> Size ...
///                       SizeEnd (size 0) -> Trailer -> TrailerLine* -> Done
/// ```
#[derive(Debug)]
pub struct Chunks {
    state: Chunk,
    /// Of the current chunk: first its size, then what is left of it.
    size: u64,
    digits: u8,
    line: u32,
    chunks: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    Size,
    Extension,
    SizeEnd,
    Data,
    DataCr,
    DataLf,
    /// At the beginning of a trailer line.
    Trailer,
    TrailerLine,
    TrailerLf,
    LastLf,
    Done,
}

impl Chunks {
    fn take(&mut self, bytes: &[u8]) -> Result<usize, HeadFault> {
        let mut at = 0;
        while at < bytes.len() && self.state != Chunk::Done {
            if self.state == Chunk::Data {
                let taken = usize::try_from(self.size).map_or(bytes.len() - at, |size| size.min(bytes.len() - at));
                self.size -= taken as u64;
                at += taken;
                if self.size == 0 {
                    self.state = Chunk::DataCr;
                }
            } else {
                self.step(bytes[at])?;
                at += 1;
            }
        }
        Ok(at)
    }

    fn step(&mut self, byte: u8) -> Result<(), HeadFault> {
        self.state = match (self.state, byte) {
            (Chunk::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                self.digits += 1;
                if self.digits > 15 {
                    return Err(HeadFault::Chunk);
                }
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                self.size = self.size << 4 | u64::from(digit);
                Chunk::Size
            }
            (Chunk::Size, b';') if self.digits > 0 => Chunk::Extension,
            (Chunk::Size, b'\r') if self.digits > 0 => Chunk::SizeEnd,
            (Chunk::Extension, b'\r') => Chunk::SizeEnd,
            (Chunk::Extension, b'\t' | b' '..=b'~') => self.within(Chunk::Extension, MAX_CHUNK_LINE)?,
            (Chunk::SizeEnd, b'\n') => self.begin()?,
            (Chunk::DataCr, b'\r') => Chunk::DataLf,
            (Chunk::DataLf, b'\n') => Chunk::Size,
            (Chunk::Trailer, b'\r') => Chunk::LastLf,
            (Chunk::TrailerLine, b'\r') => Chunk::TrailerLf,
            (Chunk::Trailer | Chunk::TrailerLine, b'\t' | b' '..=b'~') => {
                self.within(Chunk::TrailerLine, MAX_TRAILERS)?
            }
            (Chunk::TrailerLf, b'\n') => Chunk::Trailer,
            (Chunk::LastLf, b'\n') => Chunk::Done,
            _ => return Err(HeadFault::Chunk),
        };
        Ok(())
    }

    fn within(&mut self, state: Chunk, limit: u32) -> Result<Chunk, HeadFault> {
        self.line += 1;
        if self.line > limit { Err(HeadFault::Chunk) } else { Ok(state) }
    }

    fn begin(&mut self) -> Result<Chunk, HeadFault> {
        self.digits = 0;
        self.line = 0;
        if self.size == 0 {
            return Ok(Chunk::Trailer);
        }
        self.chunks += 1;
        if self.chunks > MAX_CHUNKS { Err(HeadFault::TooManyChunks) } else { Ok(Chunk::Data) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(head: &str) -> Result<BodyLength, HeadFault> {
        let end = HeadScan::default().scan(head.as_bytes())?.expect("the head is whole");
        check_head(&head.as_bytes()[..end])
    }

    fn with(headers: &str) -> Result<BodyLength, HeadFault> {
        whole(&format!("POST /v2 HTTP/1.1\r\nHost: a\r\n{headers}\r\n"))
    }

    #[test]
    fn ordinary_heads_pass() {
        assert_eq!(with(""), Ok(BodyLength::Declared(0)));
        assert_eq!(with("Content-Length: 12\r\nX:\r\n"), Ok(BodyLength::Declared(12)));
        assert_eq!(with("Transfer-Encoding:  Chunked \r\n"), Ok(BodyLength::Chunked));
    }

    #[test]
    fn t14_ambiguous_framing_is_refused() {
        use HeadFault::*;
        for (headers, fault) in [
            ("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", BothLengths),
            ("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", BothLengths),
            ("Content-Length: 5\r\nContent-Length: 6\r\n", ContentLength),
            ("Content-Length: 5, 6\r\n", ContentLength),
            ("Content-Length: +5\r\n", ContentLength),
            ("Content-Length: -5\r\n", ContentLength),
            ("Content-Length: 0x5\r\n", ContentLength),
            ("Content-Length:\r\n", ContentLength),
            ("Content-Length: 9999999999999999999\r\n", ContentLength),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", TransferEncoding),
            ("Transfer-Encoding: gzip, chunked\r\n", TransferEncoding),
            ("Transfer-Encoding: xchunked\r\n", TransferEncoding),
            ("Transfer-Encoding : chunked\r\n", SpaceBeforeColon),
            ("X: a\r\n b\r\n", ObsoleteFold),
            ("X: a\r\n\tContent-Length: 5\r\n", ObsoleteFold),
            ("X: a\nContent-Length: 5\r\n", BareLineFeed),
            ("X: a\rb\r\n", HeaderValue),
            ("X: a\0b\r\n", HeaderValue),
            ("X\0: b\r\n", HeaderName),
            (": b\r\n", HeaderName),
            ("nocolon\r\n", HeaderName),
            ("Host: b\r\n", Host),
        ] {
            assert_eq!(with(headers), Err(fault), "{headers:?}");
        }
        assert_eq!(HeadScan::default().scan(b"GET / HTTP/1.1\n").unwrap_err(), BareLineFeed);
        assert_eq!(HeadScan::default().scan(b"\r\nGET / HTTP/1.1\r\n").unwrap_err(), RequestLine);
    }

    #[test]
    fn t15_http_1_0_has_no_transfer_encoding() {
        let head = "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(whole(head), Err(HeadFault::TransferEncoding));
    }

    #[test]
    fn request_lines_are_of_one_form() {
        for line in [
            "GET  / HTTP/1.1",
            "GET / HTTP/2.0",
            "GET /",
            "get / HTTP/1.1",
            "GET http://a/ HTTP/1.1",
            "OPTIONS * HTTP/1.1",
            "GET /\u{e9} HTTP/1.1",
        ] {
            assert_eq!(whole(&format!("{line}\r\nHost: a\r\n\r\n")), Err(HeadFault::RequestLine), "{line}");
        }
    }

    #[test]
    fn t24_a_head_is_bounded_while_it_arrives() {
        let long = format!("GET / HTTP/1.1\r\nX: {}", "a".repeat(MAX_HEAD));
        assert_eq!(HeadScan::default().scan(long.as_bytes()), Err(HeadFault::TooLarge));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "X: a\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(HeadScan::default().scan(many.as_bytes()), Err(HeadFault::TooManyHeaders));
        let most = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: a\r\n".repeat(MAX_HEADERS - 1));
        assert!(whole(&most).is_ok());
    }

    #[test]
    fn a_head_ends_at_the_same_byte_however_it_arrives() {
        let wire = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /next";
        for first in 0..wire.len() {
            let mut scan = HeadScan::default();
            let found = match scan.scan(&wire[..first]).unwrap() {
                Some(end) => end,
                None => scan.scan(wire).unwrap().unwrap(),
            };
            assert_eq!(found, 27, "split at {first}");
        }
    }

    fn chunked(wire: &[u8], piece: usize) -> Result<(usize, bool), HeadFault> {
        let mut body = Body::new(BodyLength::Chunked);
        let mut taken = 0;
        for part in wire.chunks(piece) {
            taken += body.take(part)?;
            if body.is_done() {
                break;
            }
        }
        Ok((taken, body.is_done()))
    }

    #[test]
    fn a_chunked_body_ends_at_the_same_byte_however_it_arrives() {
        let body = b"5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\nX: y\r\n\r\n";
        let wire = [&body[..], b"GET /next"].concat();
        for piece in 1..wire.len() {
            assert_eq!(chunked(&wire, piece), Ok((body.len(), true)), "in pieces of {piece}");
        }
    }

    #[test]
    fn t14_malformed_chunks_are_refused() {
        for wire in [
            "\r\n",
            "x\r\n",
            "5\nhello",
            "5\r\nhelloX",
            "5\r\nhello\n",
            "1000000000000000\r\n",
            "-1\r\n",
            "0x5\r\n",
            " 5\r\n",
            "5 \r\n",
            "0\r\n\n",
        ] {
            assert_eq!(chunked(wire.as_bytes(), 64), Err(HeadFault::Chunk), "{wire:?}");
        }
    }

    #[test]
    fn t31_the_number_of_chunks_is_bounded() {
        let most = "1\r\na\r\n".repeat(MAX_CHUNKS as usize);
        assert_eq!(chunked(format!("{most}0\r\n\r\n").as_bytes(), 1 << 14).map(|(_, done)| done), Ok(true));
        assert_eq!(chunked(format!("{most}1\r\na").as_bytes(), 1 << 14), Err(HeadFault::TooManyChunks));
    }
}
