//! Errors with the codes of the spec, section "Error".

use serde_json::{Value, json};

/// Codes of the spec. From 100 on they are the plugin's own; none is used.
pub mod code {
    /// The configuration's version is not spoken.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// A field of the configuration asks for something that is not supported.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container is unknown: nothing to clean up.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A CNI_* variable is missing or invalid; the message names it.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Reading input, or a file or socket, failed.
    pub const IO_FAILURE: u32 = 5;
    /// Input is not the JSON that the spec asks for.
    pub const DECODING_FAILURE: u32 = 6;
    /// The configuration is well-formed but wrong.
    pub const INVALID_CONFIG: u32 = 7;
    /// A transient condition: the runtime should try again.
    pub const TRY_AGAIN_LATER: u32 = 11;
    /// STATUS: ADD cannot be served.
    pub const NOT_AVAILABLE: u32 = 50;
    /// STATUS: ADD cannot be served and containers on the network may be cut.
    pub const NOT_AVAILABLE_LIMITED: u32 = 51;
    /// Anything else, as the reference library uses it.
    pub const INTERNAL: u32 = 999;
}

/// An error as the plugin prints it on standard output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{msg}{}", if details.is_empty() { String::new() } else { format!(": {details}") })]
pub struct CniError {
    /// See [`code`].
    pub code: u32,
    /// One sentence.
    pub msg: String,
    /// More for the reader of logs; may be empty.
    pub details: String,
}

impl CniError {
    /// An error without details.
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// The same error with details.
    #[must_use]
    pub fn details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// The error object of the spec; `version` is echoed as it came in.
    #[must_use]
    pub fn to_json(&self, version: &str) -> Value {
        let mut object = json!({ "cniVersion": version, "code": self.code, "msg": self.msg });
        if !self.details.is_empty() {
            object["details"] = json!(self.details);
        }
        object
    }
}
