//! The parameters that a runtime passes in the environment, spec section "Parameters".

use super::{CniError, code};

/// Longest interface name of Linux (IFNAMSIZ without the final zero).
const INTERFACE_NAME_MAX: usize = 15;
/// Longest container id that is accepted: ids are part of keys in the lease store and of file names.
const CONTAINER_ID_MAX: usize = 200;

/// CNI_COMMAND.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Attach.
    Add,
    /// Detach.
    Del,
    /// Compare an attachment with its result.
    Check,
    /// Free what is not valid any more.
    Gc,
    /// Ready for ADD?
    Status,
    /// Which versions are spoken?
    Version,
}

impl Command {
    /// Reads CNI_COMMAND.
    ///
    /// # Errors
    /// Code 4 when it is missing or unknown.
    pub fn parse(text: Option<&str>) -> Result<Self, CniError> {
        match text.unwrap_or_default() {
            "ADD" => Ok(Self::Add),
            "DEL" => Ok(Self::Del),
            "CHECK" => Ok(Self::Check),
            "GC" => Ok(Self::Gc),
            "STATUS" => Ok(Self::Status),
            "VERSION" => Ok(Self::Version),
            "" => Err(invalid("CNI_COMMAND", "is not set")),
            other => Err(invalid("CNI_COMMAND", &format!("\"{other}\" is unknown"))),
        }
    }
}

/// The validated environment of one call. What a verb does not need may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CniEnv {
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// CNI_NETNS.
    pub netns: String,
    /// CNI_ARGS.
    pub args: CniArgs,
}

/// What is read from CNI_ARGS. Other keys are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CniArgs {
    /// K8S_POD_NAMESPACE.
    pub pod_namespace: String,
    /// K8S_POD_NAME.
    pub pod_name: String,
    /// K8S_POD_UID.
    pub pod_uid: String,
}

impl CniEnv {
    /// Reads and checks the variables that `command` needs.
    ///
    /// # Errors
    /// Code 4 naming the first variable that is missing or invalid.
    pub fn parse<'a>(command: Command, get: impl Fn(&str) -> Option<&'a str>) -> Result<Self, CniError> {
        let value = |name: &str| get(name).unwrap_or_default().to_owned();
        let attachment = matches!(command, Command::Add | Command::Del | Command::Check);
        if !attachment {
            return Ok(Self::default());
        }
        let env = Self {
            container_id: value("CNI_CONTAINERID"),
            ifname: value("CNI_IFNAME"),
            netns: value("CNI_NETNS"),
            args: match CniArgs::parse(&value("CNI_ARGS")) {
                // DEL goes by the container's id: it succeeds as far as it can (spec, "DEL").
                Err(_) if command == Command::Del => CniArgs::default(),
                parsed => parsed?,
            },
        };
        check_attachment(&env.container_id, &env.ifname)?;
        // DEL must succeed without a namespace (spec, "DEL").
        if env.netns.is_empty() && command != Command::Del {
            return Err(invalid("CNI_NETNS", "is not set"));
        }
        if !env.netns.is_empty() && !env.netns.starts_with('/') {
            return Err(invalid("CNI_NETNS", &format!("\"{}\" is not an absolute path", env.netns)));
        }
        Ok(env)
    }
}

impl CniArgs {
    /// Reads `K=V;K=V`.
    ///
    /// # Errors
    /// Code 4 when a part has no `=`.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let mut args = Self::default();
        for part in text.split(';').filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(invalid("CNI_ARGS", &format!("has the part \"{part}\" without \"=\"")));
            };
            match key {
                "K8S_POD_NAMESPACE" => value.clone_into(&mut args.pod_namespace),
                "K8S_POD_NAME" => value.clone_into(&mut args.pod_name),
                "K8S_POD_UID" => value.clone_into(&mut args.pod_uid),
                _ => {}
            }
        }
        if args.pod_name.is_empty() && !args.pod_namespace.is_empty() {
            return Err(invalid("CNI_ARGS", "names K8S_POD_NAMESPACE without K8S_POD_NAME"));
        }
        if !args.pod_name.is_empty() && args.pod_namespace.is_empty() {
            // podman passes its container's name and nothing else. As everywhere in Kubernetes that is a name in `default`: were it
            // no pod at all, no policy would apply to it.
            DEFAULT_NAMESPACE.clone_into(&mut args.pod_namespace);
        }
        Ok(args)
    }
}

/// Whether an attachment can have this container's id and this interface's name.
///
/// # Errors
/// Code 4, with the variable and what is wrong with it.
pub fn check_attachment(container_id: &str, ifname: &str) -> Result<(), CniError> {
    check_container_id(container_id)?;
    check_ifname(ifname)
}

/// Where a pod is that is named without a namespace.
const DEFAULT_NAMESPACE: &str = "default";

fn check_container_id(id: &str) -> Result<(), CniError> {
    if id.is_empty() {
        return Err(invalid("CNI_CONTAINERID", "is not set"));
    }
    if !is_identifier(id) || id.len() > CONTAINER_ID_MAX {
        return Err(invalid("CNI_CONTAINERID", "must be letters, digits, \"_\", \".\" and \"-\""));
    }
    Ok(())
}

fn check_ifname(name: &str) -> Result<(), CniError> {
    if name.is_empty() {
        return Err(invalid("CNI_IFNAME", "is not set"));
    }
    let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control() || !c.is_ascii();
    if name.len() > INTERFACE_NAME_MAX || name == "." || name == ".." || name.contains(forbidden) {
        return Err(invalid("CNI_IFNAME", &format!("\"{name}\" is not an interface name of Linux")));
    }
    if name == "lo" {
        return Err(invalid("CNI_IFNAME", "\"lo\" is the loopback interface"));
    }
    Ok(())
}

/// Spec: an alphanumeric character followed by alphanumerics, `_`, `.` or `-`.
#[must_use]
pub fn is_identifier(text: &str) -> bool {
    let first = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    first && text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

fn invalid(name: &str, what: &str) -> CniError {
    CniError::new(code::INVALID_ENVIRONMENT, format!("{name} {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_env<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<&'a str> {
        move |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| *value)
    }

    const FULL: [(&str, &str); 4] = [
        ("CNI_CONTAINERID", "c1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/run/netns/a"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db;K8S_POD_UID=u"),
    ];

    #[test]
    fn a_full_environment_is_read() {
        let env = CniEnv::parse(Command::Add, mk_env(&FULL)).unwrap();
        assert_eq!((env.args.pod_namespace.as_str(), env.args.pod_name.as_str()), ("shop", "db"));
        assert_eq!(env.netns, "/run/netns/a");
    }

    #[test]
    fn each_missing_or_invalid_variable_is_named_with_code_4() {
        let cases = [
            ("CNI_CONTAINERID", ""),
            ("CNI_CONTAINERID", "../x"),
            ("CNI_IFNAME", ""),
            ("CNI_IFNAME", "an-interface-too-long"),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", ".."),
            ("CNI_NETNS", ""),
            ("CNI_NETNS", "relative"),
            ("CNI_ARGS", "K8S_POD_NAME"),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=a"),
        ];
        for (name, value) in cases {
            let pairs: Vec<_> = FULL.iter().map(|&(k, v)| (k, if k == name { value } else { v })).collect();
            let error = CniEnv::parse(Command::Add, mk_env(&pairs)).unwrap_err();
            assert_eq!(error.code, code::INVALID_ENVIRONMENT, "{name}={value}");
            assert!(error.msg.contains(name), "{error}");
        }
    }

    #[test]
    fn a_pod_without_a_namespace_is_in_the_default_one() {
        let args = CniArgs::parse("IgnoreUnknown=1;K8S_POD_NAME=web").unwrap();
        assert_eq!((args.pod_namespace.as_str(), args.pod_name.as_str()), ("default", "web"));
    }

    #[test]
    fn del_needs_no_namespace_and_gc_needs_nothing() {
        let pairs: Vec<_> = FULL.iter().copied().filter(|(key, _)| *key != "CNI_NETNS").collect();
        assert!(CniEnv::parse(Command::Del, mk_env(&pairs)).is_ok());
        assert!(CniEnv::parse(Command::Check, mk_env(&pairs)).is_err());
        assert!(CniEnv::parse(Command::Gc, mk_env(&[])).is_ok());
    }
}
