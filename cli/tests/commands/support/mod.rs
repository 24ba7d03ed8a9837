//! An admin port that gives prepared answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};

/// One request as the port saw it.
#[derive(Debug)]
pub struct Asked {
    pub head: Vec<String>,
    pub body: Vec<u8>,
}

/// Runs `spillway COMMAND… --admin ADDRESS ARGUMENTS…` against a port that gives these answers, status and body, in turn:
/// what was asked, what was printed, and whether it exited with 0.
pub fn asking(
    command: &[&str],
    arguments: &[&str],
    input: &str,
    answers: &[(&str, &str)],
) -> (Vec<Asked>, String, bool) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answers: Vec<(String, String)> =
        answers.iter().map(|(status, body)| ((*status).into(), (*body).into())).collect();
    let admin = std::thread::spawn(move || answers.iter().map(|answer| serve(&listener, answer)).collect());
    let (text, ok) = spillway(&[command, &["--admin", &address], arguments].concat(), input);
    (admin.join().unwrap(), text, ok)
}

fn serve(listener: &TcpListener, (status, body): &(String, String)) -> Asked {
    let (stream, _) = listener.accept().unwrap();
    let mut reader = BufReader::new(&stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.trim_end() {
            "" => break,
            line => head.push(line.to_owned()),
        }
    }
    let mut taken = Vec::new();
    let length = head.iter().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    if length > 0 && status.starts_with("200") {
        (&stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
        taken = vec![0; length];
        reader.read_exact(&mut taken).unwrap();
    }
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    (&stream).write_all(answer.as_bytes()).unwrap();
    Asked { head, body: taken }
}

/// What is printed, and whether it exits with 0.
pub fn spillway(arguments: &[&str], input: &str) -> (String, bool) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spillway"));
    let mut child =
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Who does not want it may have left.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    (String::from_utf8([output.stdout, output.stderr].concat()).unwrap(), output.status.success())
}
