//! Reads JSON in one pass, without building a tree.
//!
//! The rule: strict RFC 8259, no key twice in one object, depth counted before descending. Tokens are
//! slices of the text. serde_json would need a pass for each of these and a tree for the data, which is
//! most of a body; the tests hold this scanner to what serde_json accepts.

use std::borrow::Cow;

use super::super::{InvalidRequest, Limits};

/// More keys than this are in no object of the protocol; bounds what remembering them costs.
const OBJECT_KEYS: usize = 256;

/// Bounds the stack whatever the settings say.
const DEPTH: usize = 256;

#[derive(Clone)]
pub(super) struct Scanner<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    max_depth: usize,
    max_keys: usize,
    max_text: usize,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str, limits: &Limits) -> Self {
        Self {
            text,
            at: 0,
            depth: 0,
            max_depth: limits.json_depth.min(DEPTH),
            max_keys: limits.parameters.max(OBJECT_KEYS),
            max_text: limits.text,
        }
    }

    /// Bytes that are still to be read.
    pub(super) fn rest(&self) -> usize {
        self.text.len() - self.at
    }

    pub(super) fn fault(&self, expected: &str) -> InvalidRequest {
        InvalidRequest::Json(format!("expected {expected} at byte {}", self.at))
    }

    /// The next byte that is not white space; stays before it.
    #[inline]
    pub(super) fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while let Some(&byte) = bytes.get(self.at) {
            if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
                return Some(byte);
            }
            self.at += 1;
        }
        None
    }

    /// Passes `byte` if it is next.
    #[inline]
    pub(super) fn pass(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    /// Nothing but white space follows.
    pub(super) fn end(&mut self) -> Result<(), InvalidRequest> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.fault("the end")),
        }
    }

    /// Reads an object, giving each key to `field`, which reads the value.
    pub(super) fn object(
        &mut self,
        mut field: impl FnMut(&mut Self, &str) -> Result<(), InvalidRequest>,
    ) -> Result<(), InvalidRequest> {
        self.descend(b'{', "an object")?;
        let mut keys = Vec::new();
        if !self.pass(b'}') {
            loop {
                let key = self.string()?;
                if !self.pass(b':') {
                    return Err(self.fault("':'"));
                }
                if keys.len() == self.max_keys {
                    return Err(InvalidRequest::Limit { what: "keys of one JSON object", limit: self.max_keys });
                }
                field(self, &key)?;
                keys.push(key);
                if self.pass(b'}') {
                    break;
                }
                if !self.pass(b',') {
                    return Err(self.fault("',' or '}'"));
                }
            }
        }
        keys.sort_unstable();
        if keys.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(InvalidRequest::Json(format!("an object that ends at byte {} has a key twice", self.at)));
        }
        self.depth -= 1;
        Ok(())
    }

    /// Reads an array, calling `item` before each element, with its index.
    #[inline]
    pub(super) fn array(
        &mut self,
        mut item: impl FnMut(&mut Self, usize) -> Result<(), InvalidRequest>,
    ) -> Result<(), InvalidRequest> {
        self.descend(b'[', "an array")?;
        if !self.pass(b']') {
            for index in 0.. {
                item(self, index)?;
                if self.pass(b']') {
                    break;
                }
                if !self.pass(b',') {
                    return Err(self.fault("',' or ']'"));
                }
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn descend(&mut self, opening: u8, expected: &str) -> Result<(), InvalidRequest> {
        if !self.pass(opening) {
            return Err(self.fault(expected));
        }
        self.depth += 1;
        if self.depth > self.max_depth { Err(InvalidRequest::JsonDepth(self.max_depth)) } else { Ok(()) }
    }

    /// Passes `null` if it is next.
    pub(super) fn null(&mut self) -> bool {
        self.peek() == Some(b'n') && self.word("null")
    }

    pub(super) fn boolean(&mut self) -> Option<bool> {
        match self.peek()? {
            b't' => self.word("true").then_some(true),
            b'f' => self.word("false").then_some(false),
            _ => None,
        }
    }

    fn word(&mut self, word: &str) -> bool {
        let found = self.text.as_bytes()[self.at..].starts_with(word.as_bytes());
        self.at += if found { word.len() } else { 0 };
        found
    }

    /// A number as it is written. It is not yet known to be in any range.
    #[inline]
    pub(super) fn number(&mut self) -> Result<&'a str, InvalidRequest> {
        self.peek();
        let from = self.at;
        let bytes = self.text.as_bytes();
        let mut at = from;
        let digits = |at: &mut usize| {
            let start = *at;
            while bytes.get(*at).is_some_and(u8::is_ascii_digit) {
                *at += 1;
            }
            *at - start
        };
        at += usize::from(bytes.get(at) == Some(&b'-'));
        let leading_zero = bytes.get(at) == Some(&b'0');
        let whole = digits(&mut at);
        let mut valid = whole == 1 || (whole > 1 && !leading_zero);
        if bytes.get(at) == Some(&b'.') {
            at += 1;
            valid &= digits(&mut at) > 0;
        }
        if matches!(bytes.get(at), Some(b'e' | b'E')) {
            at += 1;
            at += usize::from(matches!(bytes.get(at), Some(b'+' | b'-')));
            valid &= digits(&mut at) > 0;
        }
        if !valid {
            return Err(self.fault("a number"));
        }
        self.at = at;
        Ok(&self.text[from..at])
    }

    /// A string, borrowed unless it holds escapes.
    pub(super) fn string(&mut self) -> Result<Cow<'a, str>, InvalidRequest> {
        let (token, escaped) = self.string_token()?;
        self.unescape(token, escaped)
    }

    /// A string of limited length; refused before it is copied.
    pub(super) fn text(&mut self, what: &'static str) -> Result<String, InvalidRequest> {
        let (token, escaped) = self.string_token()?;
        let limit = InvalidRequest::Limit { what, limit: self.max_text };
        // The longest escape, \u0000, writes one byte in six.
        if token.len() - 2 > self.max_text.saturating_mul(if escaped { 6 } else { 1 }) {
            return Err(limit);
        }
        let text = self.unescape(token, escaped)?;
        if text.len() > self.max_text { Err(limit) } else { Ok(text.into_owned()) }
    }

    fn unescape(&self, token: &'a str, escaped: bool) -> Result<Cow<'a, str>, InvalidRequest> {
        if !escaped {
            return Ok(Cow::Borrowed(&token[1..token.len() - 1]));
        }
        let text = serde_json::from_str::<String>(token);
        text.map(Cow::Owned).map_err(|_| self.fault("a string with valid escapes before this"))
    }

    /// A string with its quotes, and whether it holds escapes.
    #[inline]
    fn string_token(&mut self) -> Result<(&'a str, bool), InvalidRequest> {
        if !self.pass(b'"') {
            return Err(self.fault("a string"));
        }
        let bytes = self.text.as_bytes();
        let from = self.at - 1;
        let mut escaped = false;
        let mut at = self.at;
        loop {
            match bytes.get(at) {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    at += 2;
                }
                Some(0x20..) => at += 1,
                Some(_) | None => {
                    self.at = at.min(bytes.len());
                    return Err(self.fault("the rest of a string"));
                }
            }
        }
        self.at = at + 1;
        // A quote and a backslash are whole characters, so this lies on character boundaries.
        Ok((&self.text[from..self.at], escaped))
    }

    /// Passes any value, holding it to the same rules.
    pub(super) fn skip(&mut self) -> Result<(), InvalidRequest> {
        match self.peek() {
            Some(b'{') => self.object(|scanner, _| scanner.skip()),
            Some(b'[') => self.array(|scanner, _| scanner.skip()),
            Some(b'"') => self.string().map(drop),
            Some(b'-' | b'0'..=b'9') => self.number().map(drop),
            _ if self.null() || self.boolean().is_some() => Ok(()),
            _ => Err(self.fault("a value")),
        }
    }
}
