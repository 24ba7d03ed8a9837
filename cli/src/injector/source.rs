//! Which process is at the other end of a connection on this machine, as Linux tells in `/proc`.
//!
//! All of `spillway dev` has one address, so that a link cannot tell by addresses who comes.

use std::fs;
use std::net::SocketAddr;

/// The name of the process whose socket is `from`, connected to `to`. None: none of these, or the kernel does not say.
pub fn process_of(from: SocketAddr, to: SocketAddr, processes: &[(u32, String)]) -> Option<String> {
    let inode = inode_of(&fs::read_to_string("/proc/net/tcp").ok()?, from, to)?;
    let socket = format!("socket:[{inode}]");
    let has_it = |pid: u32| {
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        let links = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
        links.into_iter().any(|link| link.to_str() == Some(&socket))
    };
    processes.iter().find(|(pid, _)| has_it(*pid)).map(|(_, name)| name.clone())
}

/// From the kernel's table (proc_net_tcp.txt): local and remote address are its second and third column, the inode
/// its tenth.
fn inode_of(table: &str, from: SocketAddr, to: SocketAddr) -> Option<u64> {
    let (from, to) = (hexadecimal(from)?, hexadecimal(to)?);
    let line = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let mut line = line.filter(|line| line.get(1) == Some(&from.as_str()) && line.get(2) == Some(&to.as_str()));
    line.next()?.get(9)?.parse().ok().filter(|inode| *inode != 0)
}

/// The address as a number in the machine's order, and the port.
fn hexadecimal(address: SocketAddr) -> Option<String> {
    let SocketAddr::V4(address) = address else { return None };
    Some(format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_of_a_connection_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(to).unwrap();
        let from = client.local_addr().unwrap();
        let here = vec![(1, "init".to_owned()), (std::process::id(), "us".to_owned())];
        assert_eq!(process_of(from, to, &here).as_deref(), Some("us"));
        assert_eq!(process_of(from, to, &here[..1]), None);
        assert_eq!(process_of(to, to, &here), None);
    }

    #[test]
    fn a_table_is_read_by_both_ends() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:1F90 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 20 4 30 10 -1\n   \
                     1: 0100007F:1F90 0100007F:0051 06 00000000:00000000 00:00000000 00000000     0        0 0 3\n";
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(inode_of(table, at(0x1f90), at(0x50)), Some(4711));
        assert_eq!(inode_of(table, at(0x1f90), at(0x51)), None, "a connection that has ended is nobody's");
        assert_eq!(inode_of(table, at(1), at(0x50)), None);
        assert_eq!(inode_of("", "[::1]:80".parse().unwrap(), at(1)), None);
    }
}
