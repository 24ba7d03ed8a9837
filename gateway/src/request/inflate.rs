//! Compressed bodies of REST inference: gzip and deflate, as tritonclient sends them.
//!
//! The rule: what comes out has the limit of an uncompressed body and is counted as it grows, so that a
//! bomb costs no more than an honest body of that size; what goes in is one whole stream, and nothing
//! after it.

use bytes::Bytes;
use flate2::bufread::{GzDecoder, ZlibDecoder};

use std::io::{self, BufRead, Read};

use crate::errors::Refusal;
use crate::request::head::Coding;

/// Bytes inflated at a time: a third of a millisecond or so, then others have their turn.
const STEP: usize = 64 << 10;

/// Inflates a body to at most `limit` bytes. `keep` counts them.
pub async fn inflate(
    coding: Coding,
    body: Bytes,
    limit: usize,
    keep: impl FnMut(usize) -> Result<(), Refusal>,
) -> Result<Bytes, Refusal> {
    match coding {
        Coding::Gzip => {
            let mut decoder = GzDecoder::new(&body[..]);
            let inflated = read_all(&mut decoder, limit, keep).await?;
            check_end(decoder.into_inner())?;
            Ok(inflated)
        }
        Coding::Deflate => {
            let mut decoder = ZlibDecoder::new(&body[..]);
            let inflated = read_all(&mut decoder, limit, keep).await?;
            check_end(decoder.into_inner())?;
            Ok(inflated)
        }
        Coding::Other => Err(Refusal::Compressed),
    }
}

async fn read_all(
    decoder: &mut impl Read,
    limit: usize,
    mut keep: impl FnMut(usize) -> Result<(), Refusal>,
) -> Result<Bytes, Refusal> {
    let mut inflated = Vec::new();
    loop {
        let before = inflated.len();
        // One byte beyond the limit says that there is more.
        let step = STEP.min(limit + 1 - before) as u64;
        decoder.by_ref().take(step).read_to_end(&mut inflated).map_err(|_| Refusal::Coding)?;
        let read = inflated.len() - before;
        if inflated.len() > limit {
            return Err(Refusal::BodyTooLarge { limit });
        }
        if read == 0 {
            return Ok(inflated.into());
        }
        keep(read)?;
        tokio::task::yield_now().await;
    }
}

/// Bytes after the stream would be read by nobody, and so could mean anything to somebody else.
fn check_end(mut rest: impl BufRead) -> Result<(), Refusal> {
    match rest.fill_buf() {
        Ok([]) => Ok(()),
        Ok(_) | Err(io::Error { .. }) => Err(Refusal::Coding),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};

    use super::*;

    const LIMIT: usize = 1 << 20;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zlib(data: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    async fn code(coding: Coding, body: Vec<u8>) -> Result<Bytes, String> {
        let inflated = inflate(coding, body.into(), LIMIT, |_| Ok(())).await;
        inflated.map_err(|refusal| refusal.answer().code.into_owned())
    }

    #[tokio::test]
    async fn t30_bodies_come_out_as_they_went_in() {
        for length in [0, 1, 1_000, STEP, STEP + 1, LIMIT] {
            let data: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
            assert_eq!(code(Coding::Gzip, gzip(&data)).await.unwrap(), data);
            assert_eq!(code(Coding::Deflate, zlib(&data)).await.unwrap(), data);
        }
        assert_eq!(code(Coding::Gzip, gzip(&vec![0; LIMIT + 1])).await.unwrap_err(), "body-too-large");
    }

    #[tokio::test]
    async fn t30_a_bomb_costs_no_more_than_the_limit() {
        let zeros = vec![0; 1 << 20];
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        for _ in 0..256 {
            encoder.write_all(&zeros).unwrap();
        }
        let bomb = encoder.finish().unwrap();
        assert!(bomb.len() < 1 << 20, "{}", bomb.len());
        let mut kept = 0;
        let keep = |bytes| {
            kept += bytes;
            Ok(())
        };
        let refused = inflate(Coding::Gzip, bomb.into(), LIMIT, keep).await;
        assert!(matches!(refused, Err(Refusal::BodyTooLarge { limit: LIMIT })));
        assert!(kept <= LIMIT, "{kept}");
    }

    #[tokio::test]
    async fn t30_a_body_that_may_not_be_kept_stops_at_once() {
        let keep = |_| Err(Refusal::Overloaded);
        let refused = inflate(Coding::Gzip, gzip(&vec![0; LIMIT]).into(), LIMIT, keep).await;
        assert!(matches!(refused, Err(Refusal::Overloaded)));
    }

    #[tokio::test]
    async fn t30_what_is_not_one_whole_stream_is_refused() {
        let whole = gzip(b"{\"inputs\":[]}");
        let mut flipped = whole.clone();
        let checksum = whole.len() - 8;
        flipped[checksum] ^= 1;
        for bad in [
            Vec::new(),
            b"{}".to_vec(),
            whole[..whole.len() - 1].to_vec(),
            whole[..12].to_vec(),
            flipped,
            [&whole[..], b"x"].concat(),
            [&whole[..], &whole[..]].concat(),
            zlib(b"{}"),
        ] {
            assert_eq!(code(Coding::Gzip, bad.clone()).await.unwrap_err(), "invalid-encoding", "{bad:?}");
        }
        let whole = zlib(b"{}");
        for bad in [Vec::new(), gzip(b"{}"), whole[..whole.len() - 1].to_vec(), [&whole[..], b"x"].concat()] {
            assert_eq!(code(Coding::Deflate, bad.clone()).await.unwrap_err(), "invalid-encoding", "{bad:?}");
        }
    }
}
