//! `spillway cache purge`: what it asks of the admin port, what it prints, and how it exits.

/// Purges at an admin port that gives one answer: the lines of the request, what is printed, whether it exits with 0.
fn purge(arguments: &[&str], status: &str, body: &str) -> (Vec<String>, String, bool) {
    let (mut asked, text, ok) = crate::support::asking(&["cache", "purge"], arguments, "", &[(status, body)]);
    (asked.remove(0).head, text, ok)
}

#[test]
fn one_thing_is_purged_by_a_post_that_is_meant() {
    let done = r#"{"bytes":700,"entries":2,"region":true}"#;
    let (head, text, ok) = purge(&["--entity", "a b/\u{e9}"], "200 OK", done);
    assert_eq!(head[0], "POST /cache/purge?entity=a%20b%2f%c3%a9 HTTP/1.1");
    assert!(head.contains(&"x-spillway-admin: purge".to_owned()), "{head:?}");
    assert_eq!((text.as_str(), ok), ("results purged: 2, bytes: 700\n", true));
    assert!(purge(&["--model", "eta"], "200 OK", done).0[0].contains("?model=eta "));
    assert!(purge(&["--tenant", "acme"], "200 OK", r#"{"bytes":0,"entries":0,"region":null}"#).2);
}

#[test]
fn what_did_not_reach_the_region_is_a_failure() {
    let (_, text, ok) = purge(&["--model", "eta"], "200 OK", r#"{"bytes":0,"entries":0,"region":false}"#);
    assert!(text.contains("Redis could not be told") && !ok, "{text}");
    let (_, text, ok) = purge(&["--model", "-"], "400 Bad Request", r#"{"error":"that is no name"}"#);
    assert!(text.contains("the gateway says 400: that is no name") && !ok, "{text}");
    let (_, text, ok) = purge(&["--model", "eta"], "403 Forbidden", "only from loopback\n");
    assert!(text.contains("the gateway says 403: only from loopback") && !ok, "{text}");
}

#[test]
fn nothing_and_two_things_are_not_purged() {
    for arguments in [&["--admin", "127.0.0.1:1"][..], &["--admin", "127.0.0.1:1", "--model", "a", "--tenant", "b"]] {
        let (text, ok) = crate::support::spillway(&[&["cache", "purge"], arguments].concat(), "");
        assert!(text.contains("Usage") && !ok, "{text}");
    }
}
