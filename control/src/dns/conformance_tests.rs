//! The rules of THREATS 66 to 69 as others' clients see them: kdig, dig and dnsperf against a server on loopback.
//!
//! The programs come with `tests/servers/install.sh dns`.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::fixture::{Running, unlimited, view, zone};
use super::settings::{RateLimitSettings, TcpSettings};

/// Runs a program, and gives what it wrote.
async fn output(program: &str, arguments: &[String]) -> String {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; it comes with tests/servers/install.sh dns"));
    let done = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await.unwrap().unwrap();
    String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr)
}

fn start(limit: &RateLimitSettings) -> Running {
    let running = Running::start(zone(), limit, TcpSettings::default());
    running.server.take(view());
    running
}

/// Asks with kdig; `options` as its manual says, one try of two seconds.
async fn kdig(running: &Running, options: &str) -> String {
    let at = format!("@127.0.0.1 -p {} +retry=0 +timeout=2 {options}", running.address.port());
    output("kdig", &at.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).await
}

/// Each case: what is asked, what is in kdig's words, what is not.
async fn hold(cases: &[(&str, &[&str], &[&str])]) {
    let running = start(&unlimited());
    for (options, with, without) in cases {
        let text = kdig(&running, options).await;
        for expected in *with {
            assert!(text.contains(expected), "{options}: expected '{expected}' in\n{text}");
        }
        for refused in *without {
            assert!(!text.contains(refused), "{options}: '{refused}' in\n{text}");
        }
    }
}

#[tokio::test]
async fn kdig_reads_what_the_zone_says() {
    hold(&[
        ("infer.example.com A", &["status: NOERROR", "Flags: qr aa rd;", "ANSWER: "], &["WARNING"]),
        ("infer.example.com AAAA", &["2001:db8:e::1"], &["WARNING"]),
        ("infer.example.com HTTPS", &["alpn=h2,http/1.1", "ipv4hint="], &["WARNING"]),
        ("example.com SOA", &["ns1.example.com. hostmaster.example.com. 7 "], &["WARNING"]),
        ("example.com NS", &["ns2.example.net.", "ADDITIONAL SECTION", "192.0.2.53"], &["WARNING"]),
        ("us-east.example.com A", &["203.0.113.1"], &["WARNING"]),
        ("ns1.example.com AAAA", &["2001:db8::53"], &["WARNING"]),
        ("infer.example.com A +tcp", &["status: NOERROR", "(TCP)"], &["WARNING"]),
        ("infer.example.com TXT", &["status: NOERROR", "ANSWER: 0", "AUTHORITY: 1", "SOA"], &["WARNING"]),
        ("nobody.example.com A", &["status: NXDOMAIN", "AUTHORITY: 1", "SOA"], &["WARNING"]),
    ])
    .await;
}

#[tokio::test]
async fn t68_t69_kdig_meets_every_refusal() {
    hold(&[
        ("example.net A", &["status: REFUSED", "ANSWER: 0"], &["Flags: qr aa"]),
        ("example.com AXFR", &["REFUSED"], &["hostmaster"]),
        ("example.com IXFR=1", &["REFUSED"], &["hostmaster"]),
        ("example.com SOA -c CH", &["status: REFUSED"], &[]),
        ("infer.example.com ANY", &["HINFO", "RFC8482", "ANSWER: 1;"], &["198.51.100"]),
        ("infer.example.com A +edns=1", &["BADVERS"], &["198.51.100", "203.0.113"]),
    ])
    .await;
}

#[tokio::test]
async fn t68_kdig_is_told_how_much_fits_and_the_scope_of_its_subnet() {
    hold(&[
        ("infer.example.com A +edns +bufsize=65535", &["EDNS PSEUDOSECTION", "UDP size: 1232"], &["WARNING"]),
        ("infer.example.com A +noedns", &["status: NOERROR"], &["EDNS PSEUDOSECTION"]),
        ("infer.example.com A +subnet=198.51.100.77/32", &["CLIENT-SUBNET: 198.51.100.77/32/24"], &["WARNING"]),
        ("infer.example.com A +subnet=2001:db8::/56", &["CLIENT-SUBNET: 2001:db8::/56/56"], &["WARNING"]),
        ("infer.example.com A +subnet=0.0.0.0/0", &["CLIENT-SUBNET: 0.0.0.0/0/0"], &["WARNING"]),
        ("example.com SOA +subnet=198.51.100.0/24", &["CLIENT-SUBNET: 198.51.100.0/24/0"], &["WARNING"]),
    ])
    .await;
}

#[tokio::test]
async fn dig_finds_nothing_to_complain_of() {
    let running = start(&unlimited());
    for (options, expected) in [
        ("infer.example.com A +subnet=198.51.100.0/24", "; CLIENT-SUBNET: 198.51.100.0/24/24"),
        ("iNfEr.ExAmPlE.CoM A", "\niNfEr.ExAmPlE.CoM."),
        ("infer.example.com HTTPS", "alpn=\"h2,http/1.1\""),
        ("infer.example.com A +noedns +opcode=15", "status: NOTIMP"),
        ("infer.example.com A +noedns +opcode=5", "status: NOTIMP"),
        ("infer.example.com A +edns=100 +noednsnegotiation", "status: BADVERS"),
        ("infer.example.com A +ednsopt=100:0102", "status: NOERROR"),
        ("infer.example.com A +ednsflags=0x40", "status: NOERROR"),
        ("infer.example.com A +dnssec +nocookie", "flags: do; udp: 1232"),
        ("+noedns +header-only example.com", "status: FORMERR"),
        ("infer.example.com A +tcp +keepopen", "status: NOERROR"),
    ] {
        let at = format!("@127.0.0.1 -p {} +tries=1 +timeout=2 +norecurse {options}", running.address.port());
        let text = output("dig", &at.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).await;
        assert!(text.contains(expected), "{options}: expected '{expected}' in\n{text}");
        for complaint in ["Warning", "malformed", "WARNING", "mismatch"] {
            assert!(!text.contains(complaint), "{options}: {complaint} in\n{text}");
        }
    }
}

#[tokio::test]
async fn dnsperf_gets_all_of_its_answers() {
    let running = start(&unlimited());
    let folder = tempfile::tempdir().unwrap();
    let queries = folder.path().join("queries");
    let lines =
        "infer.example.com A\ninfer.example.com AAAA\ninfer.example.com HTTPS\nus-east.example.com A\nexample.com NS\n";
    std::fs::write(&queries, lines).unwrap();
    for mode in ["udp", "tcp"] {
        let arguments = format!(
            "-s 127.0.0.1 -p {} -d {} -m {mode} -n 400 -c 8 -q 32 -t 30 -e",
            running.address.port(),
            queries.display()
        );
        let arguments: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        let text = output("dnsperf", &arguments).await;
        println!("{text}");
        assert!(text.contains("Queries lost:         0"), "{mode}: {text}");
        assert!(text.contains("NOERROR 2000 (100.00%)"), "{mode}: {text}");
    }
}
