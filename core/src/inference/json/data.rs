//! The `data` of one tensor: from JSON straight into the tensor's raw bytes.

use bytes::Bytes;
use half::{bf16, f16};

use super::super::{Datatype, InvalidRequest, Limits, Tensor};
use super::scanner::Scanner;

/// Reads `data`, which is flat or nested as `shape` says.
///
/// Memory is bounded by the text that is left: an element takes at least two bytes of it.
pub(super) fn read(
    scanner: &mut Scanner<'_>,
    name: &str,
    datatype: Datatype,
    shape: &[i64],
    limits: &Limits,
) -> Result<Bytes, InvalidRequest> {
    let elements = Tensor::elements(name, shape)?;
    let width = datatype.width();
    // A BYTES element takes its length prefix at least.
    if elements.checked_mul(width.unwrap_or(4)).is_none_or(|bytes| bytes > limits.tensor) {
        return Err(InvalidRequest::Limit { what: "bytes of one tensor", limit: limits.tensor });
    }
    let written_at_most = scanner.rest() / 2 + 1;
    let capacity = match width {
        Some(width) => elements.min(written_at_most) * width,
        // Quotes and comma make up for most of the prefix; longer texts grow it.
        None => (elements * 16).min(scanner.rest()),
    };
    let mut reading =
        Reading { name, shape, elements, limit: limits.tensor, found: 0, out: Vec::with_capacity(capacity) };
    match datatype {
        Datatype::Bool => reading.all(scanner, |scanner, out| {
            let value = scanner.boolean().ok_or(Problem::new("expected true or false"))?;
            out.push(value.into());
            Ok(())
        }),
        Datatype::Uint8 => reading.numbers(scanner, |text| text.parse::<u8>().ok().map(u8::to_le_bytes)),
        Datatype::Uint16 => reading.numbers(scanner, |text| text.parse::<u16>().ok().map(u16::to_le_bytes)),
        Datatype::Uint32 => reading.numbers(scanner, |text| text.parse::<u32>().ok().map(u32::to_le_bytes)),
        Datatype::Uint64 => reading.numbers(scanner, |text| text.parse::<u64>().ok().map(u64::to_le_bytes)),
        Datatype::Int8 => reading.numbers(scanner, |text| text.parse::<i8>().ok().map(i8::to_le_bytes)),
        Datatype::Int16 => reading.numbers(scanner, |text| text.parse::<i16>().ok().map(i16::to_le_bytes)),
        Datatype::Int32 => reading.numbers(scanner, |text| text.parse::<i32>().ok().map(i32::to_le_bytes)),
        Datatype::Int64 => reading.numbers(scanner, |text| text.parse::<i64>().ok().map(i64::to_le_bytes)),
        // Through f64: std has no decimal reader for the 16-bit floats.
        Datatype::Fp16 => reading.numbers(scanner, |text| {
            text.parse().ok().map(f16::from_f64).filter(|value| value.is_finite()).map(f16::to_le_bytes)
        }),
        Datatype::Bf16 => reading.numbers(scanner, |text| {
            text.parse().ok().map(bf16::from_f64).filter(|value| value.is_finite()).map(bf16::to_le_bytes)
        }),
        Datatype::Fp32 => reading
            .numbers(scanner, |text| text.parse::<f32>().ok().filter(|value| value.is_finite()).map(f32::to_le_bytes)),
        Datatype::Fp64 => reading
            .numbers(scanner, |text| text.parse::<f64>().ok().filter(|value| value.is_finite()).map(f64::to_le_bytes)),
        Datatype::Bytes => reading.all(scanner, |scanner, out| {
            if scanner.peek() != Some(b'"') {
                return Err(Problem::new("expected a string"));
            }
            let text = scanner.string().map_err(Problem::Request)?;
            let length = u32::try_from(text.len()).map_err(|_| Problem::new("a string is too long"))?;
            out.extend_from_slice(&length.to_le_bytes());
            out.extend_from_slice(text.as_bytes());
            Ok(())
        }),
    }?;
    Ok(Bytes::from(reading.out))
}

/// What is wrong with one element; its place is added by who knows it.
enum Problem {
    Element(&'static str),
    Request(InvalidRequest),
}

impl Problem {
    fn new(problem: &'static str) -> Self {
        Self::Element(problem)
    }
}

struct Reading<'a> {
    name: &'a str,
    shape: &'a [i64],
    /// The number of elements that the shape names.
    elements: usize,
    /// Bytes of the tensor.
    limit: usize,
    found: usize,
    out: Vec<u8>,
}

impl Reading<'_> {
    fn numbers<const WIDTH: usize>(
        &mut self,
        scanner: &mut Scanner<'_>,
        parse: impl Fn(&str) -> Option<[u8; WIDTH]>,
    ) -> Result<(), InvalidRequest> {
        self.all(scanner, |scanner, out| {
            if !matches!(scanner.peek(), Some(b'-' | b'0'..=b'9')) {
                return Err(Problem::new("expected a number"));
            }
            let text = scanner.number().map_err(Problem::Request)?;
            out.extend_from_slice(&parse(text).ok_or(Problem::new("the datatype cannot hold this number"))?);
            Ok(())
        })
    }

    fn all(
        &mut self,
        scanner: &mut Scanner<'_>,
        element: impl Fn(&mut Scanner<'_>, &mut Vec<u8>) -> Result<(), Problem>,
    ) -> Result<(), InvalidRequest> {
        let mut ahead = scanner.clone();
        let nested = ahead.pass(b'[') && ahead.peek() == Some(b'[');
        if nested {
            self.nested(scanner, 0, &element)?;
        } else {
            scanner.array(|scanner, _| self.element(scanner, &element))?;
        }
        if self.found != self.elements { Err(self.length()) } else { Ok(()) }
    }

    fn nested(
        &mut self,
        scanner: &mut Scanner<'_>,
        dimension: usize,
        element: &impl Fn(&mut Scanner<'_>, &mut Vec<u8>) -> Result<(), Problem>,
    ) -> Result<(), InvalidRequest> {
        let fault = InvalidRequest::Shape {
            tensor: self.name.to_owned(),
            problem: "data is neither flat nor nested as the shape says",
        };
        let Some(&size) = self.shape.get(dimension) else { return Err(fault) };
        let innermost = dimension + 1 == self.shape.len();
        let mut count = 0_i64;
        scanner.array(|scanner, _| {
            count += 1;
            if count > size || (scanner.peek() == Some(b'[')) == innermost {
                return Err(fault.clone());
            }
            if innermost { self.element(scanner, element) } else { self.nested(scanner, dimension + 1, element) }
        })?;
        if count == size { Ok(()) } else { Err(fault) }
    }

    #[inline]
    fn element(
        &mut self,
        scanner: &mut Scanner<'_>,
        element: &impl Fn(&mut Scanner<'_>, &mut Vec<u8>) -> Result<(), Problem>,
    ) -> Result<(), InvalidRequest> {
        self.found += 1;
        if self.found > self.elements {
            return Err(self.length());
        }
        element(scanner, &mut self.out).map_err(|problem| match problem {
            Problem::Request(fault) => fault,
            Problem::Element(problem) => InvalidRequest::Element {
                tensor: self.name.to_owned(),
                problem: format!("element {}: {problem}", self.found - 1),
            },
        })?;
        if self.out.len() > self.limit {
            return Err(InvalidRequest::Limit { what: "bytes of one tensor", limit: self.limit });
        }
        Ok(())
    }

    fn length(&self) -> InvalidRequest {
        InvalidRequest::Length {
            tensor: self.name.to_owned(),
            expected: self.elements as u64,
            found: self.found as u64,
        }
    }
}
