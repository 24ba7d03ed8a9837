//! Heads, frames and bodies on the wire.

use std::process::Command;
use std::time::{Duration, Instant};

use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::h2_frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, block, frame, frames,
    opening,
};
use spillway_tests::harness::inference::{INFER, cases, entity, features};
use spillway_tests::harness::raw::Raw;
use spillway_tests::harness::region::Region;

use super::{SILENCE, others_are_served, refused, region, rejected};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t14_to_t24_heads_that_could_mean_two_things_are_refused() {
    let region = region("threats-heads").await;
    let client = region.client("acme");
    let post = |headers: &str, body: &str| format!("POST {INFER} HTTP/1.1\r\nhost: a\r\n{headers}\r\n{body}");
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
    let many = (0..101).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
    let large = format!("x-large: {}\r\n", "a".repeat(62 << 10));
    let cases: Vec<(&str, String, u16, &str)> = vec![
        ("t14 both lengths", post("content-length: 5\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n"), 400, "invalid-framing"),
        ("t14 two lengths", post("content-length: 5\r\ncontent-length: 6\r\n", "hello!"), 400, "invalid-framing"),
        ("t14 a signed length", post("content-length: +5\r\n", "hello"), 400, "invalid-framing"),
        ("t14 a fold", post("x-a: b\r\n c\r\ncontent-length: 0\r\n", ""), 400, "invalid-header"),
        ("t14 a bare line feed", "GET /v2 HTTP/1.1\nhost: a\r\n\r\n".into(), 400, "invalid-header"),
        ("t14 space before the colon", post("content-length : 5\r\n", "hello"), 400, "invalid-header"),
        ("t14 another coding", post("transfer-encoding: gzip, chunked\r\n", "0\r\n\r\n"), 400, "invalid-framing"),
        ("t14 a bad chunk", post("transfer-encoding: chunked\r\n", "zz\r\n"), 400, "invalid-chunk"),
        ("t15 chunked HTTP/1.0", "POST /v2 HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".into(), 400, "invalid-framing"),
        ("t17 an upgrade", "GET /v2 HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nGET /v2 HTTP/1.1\r\nhost: a\r\n\r\n".into(), 400, ""),
        ("t19 two hosts", "GET /v2 HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".into(), 400, "invalid-host"),
        ("t19 no host", "GET /v2 HTTP/1.1\r\nx: a\r\n\r\n".into(), 400, "invalid-host"),
        ("t20 connection names a header", post("connection: x-spillway-tenant\r\ncontent-length: 0\r\n", ""), 400, "invalid-connection-header"),
        ("t22 an escape", get("/v2/models/phishing%2finfer"), 400, "invalid-path"),
        ("t22 an escaped dot", get("/v2/%2e%2e/health/live"), 400, "invalid-path"),
        ("t22 two slashes", get("/v2//health/live"), 400, "invalid-path"),
        ("t22 a dot segment", get("/v2/models/../health/live"), 400, "invalid-path"),
        ("t22 a parameter", get("/v2/models/phishing;x=1/ready"), 400, "invalid-path"),
        ("t23 two content types", post("content-type: application/json\r\ncontent-type: text/plain\r\ncontent-length: 0\r\n", ""), 400, "duplicate-header"),
        ("t23 two deadlines", post("x-request-timeout-ms: 5\r\nx-request-timeout-ms: 9\r\ncontent-length: 0\r\n", ""), 400, "duplicate-header"),
        ("t23 two tenants", post("x-spillway-tenant: a\r\nx-spillway-tenant: b\r\ncontent-length: 0\r\n", ""), 400, "duplicate-header"),
        ("t24 many headers", post(&many, ""), 431, "headers-too-large"),
        ("t24 a large header", post(&large, ""), 431, "headers-too-large"),
    ];
    for (what, bytes, status, code) in cases {
        let before = region.gateway_metrics().sum("spillway_gateway_rejected_total", &[]);
        let mut raw = Raw::h1(&client).await;
        raw.send(&bytes).await;
        let answer = raw.read(SILENCE).await;
        assert_eq!(answer.status(), status, "{what}: {answer:?}");
        if !code.is_empty() {
            assert_eq!(answer.header("spillway-error"), code, "{what}: {answer:?}");
        }
        assert_eq!(answer.count(), 1, "{what}: nothing behind it is taken for a request: {answer:?}");
        let ambiguous = !what.starts_with("t22") && !what.starts_with("t23");
        assert!(answer.closed || !ambiguous, "{what}: the connection is closed");
        assert!(region.gateway_metrics().sum("spillway_gateway_rejected_total", &[]) > before, "{what}: it is counted");
        others_are_served(&client).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t16_a_body_that_nobody_reads_does_not_become_the_next_request() {
    let region = region("threats-unread").await;
    let client = region.client("acme");
    let smuggled = "GET /v2/models/phishing HTTP/1.1\r\nhost: a\r\n\r\n";
    let refused = format!(
        "POST /v2/repository/index HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{smuggled}",
        smuggled.len()
    );
    let mut raw = Raw::h1(&client).await;
    raw.send(format!("{refused}GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n")).await;
    let answer = raw.read(SILENCE).await;
    assert_eq!(answer.status(), 403, "{answer:?}");
    assert!(!answer.text.contains("phishing"), "the body was answered as a request: {answer:?}");
    assert!(answer.closed && answer.count() == 1 || answer.count() == 2 && answer.text.contains(" 200 "), "{answer:?}");
    others_are_served(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t18_t19_h2_requests_against_the_protocol_are_reset() {
    let region = region("threats-h2").await;
    let client = region.client("acme");
    let good = [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/v2/health/live")];
    let with = |more: &[(&'static str, &'static str)]| [&good[..], more].concat();
    let post = [(":method", "POST"), (":scheme", "https"), (":authority", "localhost"), (":path", INFER)];
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("t18 a line break in a value", headers(&with(&[("x-a", "b\r\nx-c: d")]))),
        ("t18 a NUL in a value", headers(&with(&[("x-a", "b\0c")]))),
        ("t18 an upper-case name", headers(&with(&[("X-A", "b")]))),
        ("t18 connection", headers(&with(&[("connection", "close")]))),
        ("t18 transfer-encoding", headers(&with(&[("transfer-encoding", "chunked")]))),
        ("t18 a length that is not the body's", {
            let head = frame(HEADERS, END_HEADERS, 1, &block(&[&post[..], &[("content-length", "9")]].concat()));
            [head, frame(DATA, END_STREAM, 1, b"{}")].concat()
        }),
        ("t19 a host that is another", headers(&with(&[("host", "elsewhere")]))),
        ("t19 two paths", headers(&with(&[(":path", "/v2")]))),
        ("t19 two authorities", headers(&with(&[(":authority", "elsewhere")]))),
        ("t19 a pseudo-header behind others", headers(&[("x-a", "b"), good[0], good[1], good[2], good[3]])),
        ("t19 an unknown pseudo-header", headers(&with(&[(":protocol-x", "b")]))),
    ];
    for (what, bytes) in cases {
        let before = refused(&region);
        let mut raw = Raw::h2(&client).await;
        raw.send([opening(), bytes].concat()).await;
        let (answer, closed) = raw.read_bytes(SILENCE).await;
        let found = frames(&answer);
        // Stream or connection error; where the bytes are well-formed but mean two things, a 400 will do.
        let reset = found.iter().any(|frame| frame.error().is_some_and(|code| code != 0));
        let refused = found.iter().any(|frame| frame.kind == HEADERS) && refused(&region) > before;
        assert!(reset || closed || refused, "{what}: {found:?}");
        others_are_served(&client).await;
    }
    let mut raw = Raw::h2(&client).await;
    raw.send([opening(), headers(&good)].concat()).await;
    let (answer, _) = raw.read_bytes(SILENCE).await;
    assert!(frames(&answer).iter().any(|frame| frame.kind == HEADERS && frame.stream == 1), "the good one is answered");
}

fn headers(headers: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(headers))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t29_floods_end_their_own_connection_and_honest_clients_are_served() {
    let region = region("threats-floods").await;
    let client = region.client("acme");
    let good =
        block(&[(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/v2/health/live")]);
    let post = block(&[
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "localhost"),
        (":path", INFER),
        ("content-type", "application/json"),
    ]);
    let rapid_reset = (0..20_000_u32).flat_map(|n| {
        let stream = 2 * n + 1;
        [frame(HEADERS, END_HEADERS | END_STREAM, stream, &good), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
    });
    // The server resets these streams itself: a window update of 0.
    let made_you_reset = (0..20_000_u32).flat_map(|n| {
        let stream = 2 * n + 1;
        [frame(HEADERS, END_HEADERS, stream, &post), frame(8, 0, stream, &[0, 0, 0, 0])].concat()
    });
    let mut continuations = frame(HEADERS, 0, 1, &good);
    for n in 0..20_000 {
        continuations.extend(frame(CONTINUATION, 0, 1, &block(&[(&format!("x-{n}"), "a")])));
    }
    let settings = (0..20_000).flat_map(|_| frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]));
    let pings = (0..20_000).flat_map(|_| frame(PING, 0, 0, &[7; 8]));
    let mut tiny = frame(HEADERS, END_HEADERS, 1, &post);
    tiny.extend((0..50_000).flat_map(|_| frame(DATA, 0, 1, &[])));
    let quiet = honest_p99(&client).await;
    for (what, flood) in [
        ("rapid reset", rapid_reset.collect()),
        ("made you reset", made_you_reset.collect()),
        ("continuations", continuations),
        ("settings", settings.collect::<Vec<u8>>()),
        ("pings", pings.collect()),
        ("empty data", tiny),
    ] {
        let before = connections_ended(&region);
        let mut raw = Raw::h2(&client).await;
        raw.send(opening()).await;
        let flooding = tokio::spawn(async move {
            // What comes back is not read meanwhile: the flooder takes nothing.
            let _ = tokio::time::timeout(Duration::from_secs(10), raw.send(flood)).await;
            raw.read_bytes(Duration::from_secs(2)).await
        });
        let loud = honest_p99(&client).await;
        let (answer, closed) = flooding.await.expect("it ran");
        let goaway = frames(&answer).iter().any(|frame| frame.kind == GOAWAY);
        assert!(closed || goaway, "{what}: the connection is not ended");
        assert_eq!(connections_ended(&region) - before, 1.0, "{what}: it is counted");
        assert!(loud <= (quiet * 2).max(Duration::from_millis(100)), "{what}: honest p99 {quiet:?} -> {loud:?}");
        others_are_served(&client).await;
    }
}

fn connections_ended(region: &Region) -> f64 {
    region.gateway_metrics().sum("spillway_gateway_connections_ended_total", &[])
}

async fn honest_p99(client: &Client) -> Duration {
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    let mut took = Vec::new();
    for _ in 0..200 {
        let begun = Instant::now();
        assert_eq!(open.send(client.json(INFER, &entity("site-0001"))).await.expect("an answer").status, 200);
        took.push(begun.elapsed());
    }
    spillway_tests::harness::load::percentile(&mut took, 0.99)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t25_t30_to_t32_bodies_beyond_their_limits_are_refused() {
    let region = region("threats-bodies").await;
    let client = region.client("acme");
    let post =
        |headers: &str| format!("POST {INFER} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{headers}\r\n");
    let chunk = format!("10000\r\n{}\r\n", "a".repeat(64 << 10));
    let chunked = |body: &str| [post("transfer-encoding: chunked\r\n").as_str(), body].concat();
    // Under a key that nobody reads: elsewhere a list too many is refused before it can be deep.
    let deep = format!("{{\"unread\":{}{}}}", "[".repeat(65), "]".repeat(65));
    let coded = |coding: &str, body: &[u8]| {
        let head = post(&format!("content-encoding: {coding}\r\ncontent-length: {}\r\n", body.len()));
        [head.as_bytes(), body].concat()
    };
    let cases: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        ("t25 declared", post("content-length: 2000000\r\n").into(), 413, "body-too-large"),
        ("t25 huge", post("content-length: 999999999999\r\n").into(), 413, "body-too-large"),
        ("t25 chunked", chunked(&chunk.repeat(20)).into(), 413, "body-too-large"),
        ("t30 a bomb", coded("gzip", &bomb(&region)), 413, "body-too-large"),
        ("t30 no gzip", coded("gzip", b"hello"), 400, "invalid-encoding"),
        ("t30 zstd", coded("zstd", b"hello"), 415, "unsupported-encoding"),
        ("t31 many chunks", chunked(&"1\r\n \r\n".repeat(65_537)).into(), 400, "too-many-chunks"),
        (
            "t32 deep",
            format!("{}{deep}", post(&format!("content-length: {}\r\n", deep.len()))).into(),
            400,
            "json-too-deep",
        ),
    ];
    for (what, bytes, status, code) in cases {
        let before = rejected(&region, code);
        let mut raw = Raw::h1(&client).await;
        raw.send(&bytes).await;
        let answer = raw.read(SILENCE).await;
        assert_eq!((answer.status(), answer.header("spillway-error")), (status, code), "{what}: {answer:?}");
        assert!(rejected(&region, code) > before, "{what}: it is counted");
        others_are_served(&client).await;
    }
}

/// Some 64 KiB of gzip that would be 64 MiB of zeros.
fn bomb(region: &Region) -> Vec<u8> {
    let zeros = region.folder.join("zeros");
    std::fs::File::create(&zeros).and_then(|file| file.set_len(64 << 20)).expect("a sparse file");
    let gzip = Command::new("gzip").args(["-9", "-c"]).arg(&zeros).output().expect("gzip is there");
    assert!(gzip.status.success() && gzip.stdout.len() < 1 << 20, "{}", gzip.stdout.len());
    gzip.stdout
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t26_t27_heads_and_bodies_that_drip_are_cut_off() {
    let region = region("threats-drips").await;
    let client = region.client("acme");
    let head = async {
        let mut raw = Raw::h1(&client).await;
        raw.send("GET /v2 HTTP/1.1\r\nhost: a\r\n").await;
        let begun = Instant::now();
        loop {
            raw.send("x: y\r\n").await;
            let answer = raw.read(Duration::from_millis(500)).await;
            if answer.closed || !answer.text.is_empty() {
                return (begun.elapsed(), answer);
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "a head that drips for 20 s");
        }
    };
    let body = async {
        let mut raw = Raw::h1(&client).await;
        raw.send(format!("POST {INFER} HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n")).await;
        let begun = Instant::now();
        loop {
            raw.send(" ").await;
            let answer = raw.read(Duration::from_millis(500)).await;
            if answer.closed || !answer.text.is_empty() {
                return (begun.elapsed(), answer);
            }
            assert!(begun.elapsed() < Duration::from_secs(90), "a body that drips for 90 s");
        }
    };
    let honest = async {
        for _ in 0..20 {
            others_are_served(&client).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (head, body, ()) = tokio::join!(head, body, honest);
    assert!((8..=13).contains(&head.0.as_secs()), "{head:?}");
    assert_eq!(body.1.status(), 408, "{body:?}");
    assert_eq!(body.1.header("spillway-error"), "body-too-slow");
    assert!(rejected(&region, "body-too-slow") >= 1.0);
    assert!(rejected(&region, "head-too-slow") >= 1.0);
    others_are_served(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t28_an_answer_that_nobody_reads_does_not_pile_up() {
    let region = region("threats-slow-reader").await;
    let client = region.client("acme");
    let mut raw = Raw::h1(&client).await;
    let body = features(&cases()).to_string();
    let request = format!(
        "POST {INFER} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let memory = || region.gateway_metrics().sum("process_resident_memory_bytes", &[]);
    let before = memory();
    // Requests one behind the other, no answer read: the gateway answers one at a time and then waits.
    let pipelined = request.repeat(200);
    let _ = tokio::time::timeout(Duration::from_secs(2), raw.send(pipelined)).await;
    others_are_served(&client).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(memory() - before < 8e6, "{} bytes more", memory() - before);
    let answer = raw.read(SILENCE).await;
    assert!(answer.count() >= 1 && answer.text.starts_with("HTTP/1.1 200"), "{}", answer.status());
    others_are_served(&client).await;
}
