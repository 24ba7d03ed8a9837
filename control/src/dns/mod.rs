//! The plan as answers: an authoritative server for the service zone.
