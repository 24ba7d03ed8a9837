//! What the driver says went wrong: in one word, and whether a retry may help.

use scylla::errors::{DbError, ExecutionError, RequestAttemptError};

use crate::features::store::WriteFailed;

/// A fixed word for the log.
pub(super) fn kind(error: &ExecutionError) -> &'static str {
    match error {
        ExecutionError::LastAttemptError(RequestAttemptError::DbError(error, _)) => match error {
            DbError::SyntaxError => "syntax",
            DbError::Invalid => "invalid",
            DbError::ProtocolError => "protocol",
            DbError::ConfigError => "config",
            DbError::AuthenticationError | DbError::Unauthorized => "unauthorized",
            DbError::Unavailable { .. } => "replicas-unavailable",
            DbError::ReadTimeout { .. } | DbError::WriteTimeout { .. } => "replicas-timeout",
            DbError::ReadFailure { .. } | DbError::WriteFailure { .. } => "replicas-failed",
            DbError::Overloaded | DbError::RateLimitReached { .. } => "overloaded",
            DbError::IsBootstrapping => "bootstrapping",
            _ => "server-error",
        },
        ExecutionError::LastAttemptError(RequestAttemptError::BrokenConnectionError(_))
        | ExecutionError::ConnectionPoolError(_) => "connection",
        ExecutionError::RequestTimeout(_) => "timeout",
        ExecutionError::EmptyPlan => "no-nodes",
        _ => "driver",
    }
}

/// Whether the same statement may fare better. Not matched exhaustively: the driver's enums grow, and
/// what is not known to be final is worth another try.
pub(super) fn of_write(error: &ExecutionError) -> WriteFailed {
    match error {
        ExecutionError::BadQuery(_)
        | ExecutionError::LastAttemptError(
            RequestAttemptError::SerializationError(_) | RequestAttemptError::CqlRequestSerialization(_),
        ) => WriteFailed::Refused,
        ExecutionError::LastAttemptError(RequestAttemptError::DbError(
            DbError::SyntaxError
            | DbError::Invalid
            | DbError::ProtocolError
            | DbError::ConfigError
            | DbError::AuthenticationError
            | DbError::Unauthorized,
            _,
        )) => WriteFailed::Refused,
        _ => WriteFailed::Unreached,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(error: DbError) -> ExecutionError {
        ExecutionError::LastAttemptError(RequestAttemptError::DbError(error, String::new()))
    }

    #[test]
    fn what_the_server_refuses_is_not_to_be_sent_again() {
        for error in [DbError::Invalid, DbError::SyntaxError, DbError::ProtocolError, DbError::Unauthorized] {
            assert_eq!(of_write(&said(error.clone())), WriteFailed::Refused, "{error}");
        }
        for error in [DbError::Overloaded, DbError::IsBootstrapping, DbError::ServerError] {
            assert_eq!(of_write(&said(error.clone())), WriteFailed::Unreached, "{error}");
        }
        assert_eq!(of_write(&ExecutionError::EmptyPlan), WriteFailed::Unreached);
        assert_eq!((kind(&said(DbError::Invalid)), kind(&ExecutionError::EmptyPlan)), ("invalid", "no-nodes"));
    }
}
