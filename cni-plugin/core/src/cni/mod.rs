//! The Container Network Interface, spec versions 0.3.1 to 1.1.0: environment, configuration, results, errors.
//! Pure: text in, values out. Nothing here looks at a path, a socket or the process environment.

mod capabilities;
mod config;
mod env;
mod error;
mod result;

pub use capabilities::Capabilities;
pub use config::{DEFAULT_AGENT_SOCKET, NetworkConfig, ValidAttachment};
pub use env::{CniArgs, CniEnv, Command, check_attachment, is_identifier};
pub use error::{CniError, code};
pub use result::{CniInterface, CniIp, CniResult, CniRoute};

/// Spec versions in rising order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CniVersion {
    /// 0.3.1.
    V0_3_1,
    /// 0.4.0: CHECK.
    V0_4_0,
    /// 1.0.0: addresses carry no family.
    V1_0_0,
    /// 1.1.0: GC, STATUS, MTU in results.
    V1_1_0,
}

/// All versions that are spoken, in rising order.
pub const SUPPORTED_VERSIONS: [CniVersion; 4] =
    [CniVersion::V0_3_1, CniVersion::V0_4_0, CniVersion::V1_0_0, CniVersion::V1_1_0];

/// The newest version.
pub const CURRENT_VERSION: CniVersion = CniVersion::V1_1_0;

impl CniVersion {
    /// The version as it is written in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Reads a version; anything else is error 1 of the spec.
    ///
    /// # Errors
    /// Code 1 when the version is not spoken.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        SUPPORTED_VERSIONS.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = SUPPORTED_VERSIONS.iter().map(|version| version.as_str()).collect();
            CniError::new(code::INCOMPATIBLE_VERSION, format!("cniVersion \"{text}\" is not supported"))
                .details(format!("supported versions: {}", known.join(", ")))
        })
    }
}

/// The answer to VERSION. `requested` is the version of the input, which the spec wants echoed.
#[must_use]
pub fn version_reply(requested: Option<&str>) -> serde_json::Value {
    let supported: Vec<_> = SUPPORTED_VERSIONS.iter().map(|version| version.as_str()).collect();
    let echoed = requested.unwrap_or(CURRENT_VERSION.as_str());
    serde_json::json!({ "cniVersion": echoed, "supportedVersions": supported })
}
