use spillway_runtime::settings::parse;

use super::*;

const LEAST: &str = "region: eu-west\nnode: dns-0\nidentity: {certificate: c.pem, key: k.pem, trustBundle: b.pem}\n\
    snapshot: s.bin\nlisten: ['127.0.0.1:0']\nzone: example.com\ncontact: hostmaster.example.com\n";
const SERVERS: &str =
    "nameServers: [{name: ns1.example.com, addresses: [192.0.2.53, '2001:db8::53']}, {name: ns.example.net}]\n";

fn read(rest: &str) -> Result<DnsSettings, Vec<String>> {
    parse(&format!("{LEAST}{rest}")).map_err(|faults| faults.iter().map(ToString::to_string).collect())
}

#[test]
fn little_is_needed() {
    let settings = read(SERVERS).unwrap();
    assert_eq!(settings.zone.name, settings.zone.zone, "the service is the zone itself");
    assert_eq!(settings.zone.answers, AnswerSettings::default());
    assert_eq!(settings.rate_limit, RateLimitSettings::default());
    assert_eq!(settings.tcp, TcpSettings::default());
    assert!(settings.rate_limit.gcra().is_ok());
    assert_eq!(settings.zone.name_servers[0].addresses.len(), 2);
}

#[test]
fn all_keys_are_read() {
    let settings = read(&format!(
        "{SERVERS}name: Infer.Example.com.\nttl: 1m\nhurriedTtl: 2s\naddresses: 4\ndrainTimeout: 3s\n\
         rateLimit: {{rate: 20/s, burst: 40, networks: 1024, slip: 3}}\ntcp: {{connections: 8, perNetwork: 2, idle: 5s}}\n"
    ))
    .unwrap();
    assert_eq!(settings.zone.name.as_str(), "infer.example.com");
    let seconds = Duration::from_secs;
    assert_eq!(settings.zone.answers, AnswerSettings { ttl: seconds(60), hurried_ttl: seconds(2), addresses: 4 });
    let rate = Rate { count: 20, per: seconds(1) };
    assert_eq!(settings.rate_limit, RateLimitSettings { rate, burst: 40, networks: 1_024, slip: 3 });
    assert_eq!(settings.tcp, TcpSettings { connections: 8, per_network: 2, idle: seconds(5) });
}

#[test]
fn faults_are_named() {
    for (rest, fault) in [
        ("", "nameServers: is missing"),
        ("nameServers: []\n", "nameServers: expected 1 to 8"),
        ("nameServers: [{name: ns1.example.com}]\n", "ns1.example.com: expected at least one address"),
        ("nameServers: [{name: ns.example.net, addresses: [192.0.2.1]}]\n", "ns.example.net: expected no address"),
        ("nameServers: [{name: example.com, addresses: [192.0.2.1]}]\n", "is a name of the service"),
        (&format!("{SERVERS}name: infer.badexample.com\n"), "name: expected a name in the zone example.com"),
        (&format!("{SERVERS}ttl: 500ms\n"), "ttl: expected 1s to 1h"),
        (&format!("{SERVERS}ttl: 2h\n"), "ttl: expected 1s to 1h"),
        (&format!("{SERVERS}addresses: 31\n"), "addresses:"),
        (&format!("{SERVERS}rateLimit: {{rate: 20000000/s}}\n"), "rateLimit:"),
        (&format!("{SERVERS}tcp: {{idle: 0s}}\n"), "tcp.idle:"),
        (&format!("{SERVERS}port: 53\n"), "port: unknown key"),
    ] {
        let faults = read(rest).unwrap_err();
        assert!(faults.iter().any(|line| line.contains(fault)), "{fault} in {faults:?}");
    }
}
