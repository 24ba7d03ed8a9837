//! JSON on one line that a terminal shows as it is.
//!
//! The rule: no line break, no control character and nothing that changes the direction of text gets into
//! a line, whatever the fields hold.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};

/// Appends a value, without a line break. After an error `into` holds a part of it.
pub fn write(value: &impl Serialize, into: &mut Vec<u8>) -> serde_json::Result<()> {
    value.serialize(&mut Serializer::with_formatter(into, Plain(CompactFormatter)))
}

/// Compact JSON. Besides what JSON must escape, it escapes DEL and C1 controls (U+009B starts an ANSI
/// sequence), line and paragraph separators and bidirectional marks.
struct Plain(CompactFormatter);

impl Formatter for Plain {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        // Nearly all that is logged is printable ASCII.
        if fragment.bytes().all(|byte| byte < 0x7f) {
            return self.0.write_string_fragment(writer, fragment);
        }
        let mut from = 0;
        for (at, character) in fragment.char_indices().filter(|(_, character)| misleads(*character)) {
            self.0.write_string_fragment(writer, &fragment[from..at])?;
            write!(writer, "\\u{:04x}", u32::from(character))?;
            from = at + character.len_utf8();
        }
        self.0.write_string_fragment(writer, &fragment[from..])
    }
}

fn misleads(character: char) -> bool {
    matches!(character,
        '\u{7f}'..='\u{9f}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t57_a_hostile_text_stays_one_plain_line() {
        let hostile = "a\r\n{\"status\":200}\u{1b}[2J\u{9b}31m\u{2028}\u{202e}\u{7f}\0ä";
        let mut line = Vec::new();
        write(&hostile, &mut line).unwrap();
        let text = String::from_utf8(line).unwrap();
        assert!(text.chars().all(|character| !character.is_control() && !misleads(character)), "{text:?}");
        assert_eq!(serde_json::from_str::<String>(&text).unwrap(), hostile);
    }
}
