//! REST bodies: JSON and the binary tensor extension of KServe v2, as Triton documents them.
//!
//! The rule: a value is exactly what its datatype can hold, or the request is refused; nothing is
//! allocated by what a body claims, only by what it holds. Binary tensors stay slices of the body.
//! Does not judge a request against its model: that is [`super::check`].
//!
//! Choices where KServe is silent:
//! * Unknown keys are ignored, as Triton does, but checked: a key given twice anywhere is refused.
//! * `inputs` may be absent, for a model whose inputs are all joined from features.
//! * `null` for `id`, `parameters` or `outputs` means absent.
//! * `data` is flat or nested exactly as `shape` says. Integers take no fraction and no exponent;
//!   floats are rounded once, to the nearest, and refused where that is infinite.
//! * JSON has no NaN, infinity or non-UTF-8 text: such an output must be asked for as binary.

mod data;
mod decode;
mod documents;
mod encode;
#[cfg(test)]
mod properties;
mod scanner;
#[cfg(test)]
mod tests;

pub use decode::{decode_request, header_length};
pub use documents::{error, live, model_metadata, model_ready, ready, server_metadata};
pub use encode::{OutputForms, RestBody, encode_response};
