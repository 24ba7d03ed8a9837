//! Datatypes, shapes and the bytes behind them.

use bytes::Bytes;

use super::{InvalidRequest, Limits, Parameters};

/// The 12 datatypes of KServe v2, and BF16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Fp32,
    Fp64,
    Bytes,
    Bf16,
}

impl Datatype {
    pub const ALL: [Self; 14] = [
        Self::Bool,
        Self::Uint8,
        Self::Uint16,
        Self::Uint32,
        Self::Uint64,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Fp16,
        Self::Fp32,
        Self::Fp64,
        Self::Bytes,
        Self::Bf16,
    ];

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|datatype| datatype.name() == text)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
            Self::Bf16 => "BF16",
        }
    }

    /// Bytes of one element; `None` for `BYTES`, whose elements carry their own length.
    pub fn width(self) -> Option<usize> {
        Some(match self {
            Self::Bool | Self::Uint8 | Self::Int8 => 1,
            Self::Uint16 | Self::Int16 | Self::Fp16 | Self::Bf16 => 2,
            Self::Uint32 | Self::Int32 | Self::Fp32 => 4,
            Self::Uint64 | Self::Int64 | Self::Fp64 => 8,
            Self::Bytes => return None,
        })
    }
}

impl std::fmt::Display for Datatype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub datatype: Datatype,
    pub shape: Vec<i64>,
    pub parameters: Parameters,
    /// Raw: little-endian, row-major; `BYTES` elements behind a 4-byte little-endian length.
    pub data: Bytes,
}

impl Tensor {
    /// The number of elements that the shape names.
    ///
    /// Zero-sized dimensions are refused: no model of ours has them, and they make any product lie.
    pub fn elements(name: &str, shape: &[i64]) -> Result<usize, InvalidRequest> {
        let fault = |problem| InvalidRequest::Shape { tensor: name.to_owned(), problem };
        let mut product = 1_usize;
        for &size in shape {
            let size = usize::try_from(size).ok().filter(|&size| size > 0);
            let size = size.ok_or_else(|| fault("every dimension must be at least 1"))?;
            product = product.checked_mul(size).ok_or_else(|| fault("the shape's product overflows"))?;
        }
        Ok(product)
    }

    /// Whether shape, datatype and bytes agree and stay within the limits.
    pub fn check(&self, limits: &Limits) -> Result<(), InvalidRequest> {
        if self.data.len() > limits.tensor {
            return Err(InvalidRequest::Limit { what: "bytes of one tensor", limit: limits.tensor });
        }
        if self.shape.len() > limits.dimensions {
            return Err(InvalidRequest::Limit { what: "dimensions of one tensor", limit: limits.dimensions });
        }
        self.check_length()
    }

    /// Whether shape, datatype and bytes agree.
    pub fn check_length(&self) -> Result<(), InvalidRequest> {
        let elements = Self::elements(&self.name, &self.shape)?;
        let length = |expected: usize, found: usize| InvalidRequest::Length {
            tensor: self.name.clone(),
            expected: expected as u64,
            found: found as u64,
        };
        match self.datatype.width() {
            Some(width) => {
                let expected = elements.checked_mul(width).ok_or_else(|| length(usize::MAX, self.data.len()))?;
                if expected != self.data.len() {
                    return Err(length(expected, self.data.len()));
                }
            }
            None => {
                let found = self.count_bytes_elements()?;
                if found != elements {
                    return Err(length(elements, found));
                }
            }
        }
        Ok(())
    }

    fn count_bytes_elements(&self) -> Result<usize, InvalidRequest> {
        let mut rest = &self.data[..];
        let mut count = 0;
        while !rest.is_empty() {
            let element = rest
                .split_first_chunk::<4>()
                .and_then(|(length, after)| after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?));
            let Some((_, after)) = element else {
                return Err(InvalidRequest::Element {
                    tensor: self.name.clone(),
                    problem: "a length prefix reaches past the end of the data".into(),
                });
            };
            rest = after;
            count += 1;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(datatype: Datatype, shape: &[i64], data: &[u8]) -> Tensor {
        Tensor {
            name: "x".into(),
            datatype,
            shape: shape.to_vec(),
            parameters: Parameters::default(),
            data: Bytes::copy_from_slice(data),
        }
    }

    #[test]
    fn datatype_names_round_trip() {
        for datatype in Datatype::ALL {
            assert_eq!(Datatype::parse(datatype.name()), Some(datatype));
        }
        assert_eq!(Datatype::parse("fp32"), None);
    }

    #[test]
    fn t35_a_shape_whose_product_overflows_is_refused() {
        let huge = tensor(Datatype::Fp32, &[i64::MAX, i64::MAX], &[]);
        assert_eq!(huge.check(&Limits::default()).unwrap_err().code(), "invalid-shape");
        let bytes_overflow = tensor(Datatype::Fp64, &[1 << 61], &[]);
        assert_eq!(bytes_overflow.check(&Limits::default()).unwrap_err().code(), "data-length-mismatch");
    }

    #[test]
    fn t36_negative_zero_and_mismatched_shapes_are_refused() {
        for shape in [&[-1][..], &[0], &[2, 0]] {
            assert_eq!(
                tensor(Datatype::Fp32, shape, &[]).check(&Limits::default()).unwrap_err().code(),
                "invalid-shape"
            );
        }
        let deep = tensor(Datatype::Fp32, &[1; 9], &[0; 4]);
        assert_eq!(deep.check(&Limits::default()).unwrap_err().code(), "limit-exceeded");
        assert_eq!(
            tensor(Datatype::Fp32, &[2], &[0; 7]).check(&Limits::default()).unwrap_err().code(),
            "data-length-mismatch"
        );
        assert!(tensor(Datatype::Fp32, &[2], &[0; 8]).check(&Limits::default()).is_ok());
        assert!(tensor(Datatype::Fp32, &[], &[0; 4]).check(&Limits::default()).is_ok(), "a scalar has one element");
    }

    #[test]
    fn t37_a_bytes_prefix_past_the_end_is_refused() {
        let past = tensor(Datatype::Bytes, &[1], &[5, 0, 0, 0, b'a']);
        assert_eq!(past.check(&Limits::default()).unwrap_err().code(), "invalid-element");
        let cut = tensor(Datatype::Bytes, &[1], &[5, 0]);
        assert_eq!(cut.check(&Limits::default()).unwrap_err().code(), "invalid-element");
        let two = tensor(Datatype::Bytes, &[2], &[1, 0, 0, 0, b'a', 0, 0, 0, 0]);
        assert!(two.check(&Limits::default()).is_ok());
        let elements: Vec<Bytes> = super::super::bytes_elements(&two.data).collect();
        assert_eq!(elements, [Bytes::from_static(b"a"), Bytes::new()]);
    }
}
