//! Why a request was refused, and the HTTP status of each reason.

use axum::http::StatusCode;

/// Why a request was refused; the answer is its status, and its message as JSON.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Refusal {
    #[error("{0}")]
    Invalid(String),
    #[error("there is no {0}")]
    NotFound(String),
    #[error("{0}")]
    Forbidden(String),
    #[error("a token is needed: --token of this server, as \"Authorization: Bearer TOKEN\"")]
    Token,
    #[error("expected Content-Type: application/json")]
    Media,
    #[error("more than {0} bytes")]
    Large(usize),
    #[error("the request did not arrive in {0} seconds")]
    Slow(u64),
    #[error("{0} jobs are waiting already; try again later")]
    Full(usize),
    #[error("the server is stopping")]
    Stopping,
    #[error("{0}")]
    Failed(String),
    #[error("{0}")]
    Cancelled(String),
}

impl Refusal {
    /// The status of the HTTP answer.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::Token => StatusCode::UNAUTHORIZED,
            Self::Media => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Large(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Slow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Full(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Stopping | Self::Cancelled(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// # Errors
/// [`Refusal::Invalid`] with the message, unless all is well.
pub fn ensure(ok: bool, message: impl FnOnce() -> String) -> Result<(), Refusal> {
    if ok { Ok(()) } else { Err(Refusal::Invalid(message())) }
}
