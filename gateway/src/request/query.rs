//! The query of a URL of the admin port.

/// Bytes, where `%` and two digits stand for one, and nothing ends the value.
pub fn decoded(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'&' | b'=' | b'+' => return None,
            b'%' => {
                let (digits, after) = rest.split_first_chunk::<2>()?;
                let digit = |byte: u8| char::from(byte).to_digit(16);
                bytes.push(u8::try_from(digit(digits[0])? << 4 | digit(digits[1])?).ok()?);
                rest = after;
            }
            byte => bytes.push(byte),
        }
    }
    Some(bytes)
}
