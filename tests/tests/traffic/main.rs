//! The gateway keeps good traffic right while pods, callers and stores misbehave.

mod restarts;
