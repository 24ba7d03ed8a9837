//! Certificates as processes get them: a control node's ports, nodes that renew, traffic between them. All in one
//! process, over real TLS, with leaves that live for seconds.

mod dns;
mod load;
mod process;
mod requests;
mod rotation;
mod stand;
mod tokens;
