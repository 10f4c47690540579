//! When an attachment is certainly dead: what the agent may free without being asked.
//!
//! Runtimes do not call GC yet, and some lose a DEL: without this, leases would leak until a range is used up.
//!
//! **Promise**: nothing of a living pod is taken away. What looks like evidence and is none:
//!
//! | | why not |
//! |---|---|
//! | the sandbox's path is gone | its mount may be invisible to the agent, or it was `/proc/PID/ns/net` of a process that ended while others live |
//! | the pod's object is gone | objects of a living pod may be deleted by force, and a folder may lose a file |
//! | the interface is gone | somebody may have deleted it while its pod lives and keeps its name and address in its status |
//! | a process or container list | needs a look into every PID namespace and runtime there is |
//!
//! What is certain: the kernel deletes a veth pair with the namespace that one end is in, and keeps a namespace as long as anything
//! lives in it. So **an attachment whose host end exists is never touched**, whatever all else says. With the host end gone it is
//! dead if the machine was booted since (no namespace survives that), or if also the sandbox's path is gone or is another namespace
//! *and* no object claims it, all of that for a while. A wrong verdict would take three mistakes at once, and then takes
//! an address from a pod that has no interface to use it with; it is held back like any other.
//!
//! Not freed by this: what somebody keeps a dead pod's namespace for (a forgotten mount, a leaked file descriptor). Nothing tells it
//! from a living pod. GC of the runtime, which knows, frees it.

/// Whether the machine was booted since the attachment was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// It was not.
    Same,
    /// It was.
    Earlier,
    /// Not known.
    Unknown,
}

/// What is at the path where the sandbox's namespace was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// A namespace with the same number, which may be the same one.
    Same,
    /// Another one, or something else.
    Other,
    /// Nothing.
    Missing,
    /// Cannot be told.
    Unknown,
}

/// What the objects say of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Its object is there, and no newer attachment of the node serves it.
    Claimed,
    /// Its object is there, but a newer attachment of the same pod is complete: a new sandbox.
    Superseded,
    /// Its object is gone, completed, or one of another uid.
    Unclaimed,
    /// The attachment names no pod.
    Unnamed,
    /// Objects cannot be read now.
    Unknown,
}

/// What is known of an attachment that a runtime was told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// An interface of its name or with its alias is on the node.
    pub host_end: bool,
    /// See [`Boot`].
    pub boot: Boot,
    /// See [`Sandbox`].
    pub sandbox: Sandbox,
    /// See [`Claim`].
    pub claim: Claim,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// It lives, or may live.
    Keep,
    /// Dead if this is still so after the waiting time.
    Suspect,
    /// Dead.
    Dead,
}

/// Judges one attachment.
#[must_use]
pub fn judge(facts: Facts) -> Judgement {
    if facts.host_end {
        return Judgement::Keep;
    }
    let is_unclaimed = match facts.claim {
        Claim::Superseded | Claim::Unclaimed | Claim::Unnamed => true,
        // While objects are away nothing is concluded at all: rules could not follow.
        Claim::Unknown => return Judgement::Keep,
        Claim::Claimed => false,
    };
    match (facts.boot, facts.sandbox) {
        (Boot::Earlier, _) => Judgement::Dead,
        (Boot::Same | Boot::Unknown, Sandbox::Other | Sandbox::Missing) if is_unclaimed => Judgement::Suspect,
        (Boot::Same | Boot::Unknown, _) => Judgement::Keep,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SANDBOXES: [Sandbox; 4] = [Sandbox::Same, Sandbox::Other, Sandbox::Missing, Sandbox::Unknown];
    const CLAIMS: [Claim; 5] =
        [Claim::Claimed, Claim::Superseded, Claim::Unclaimed, Claim::Unnamed, Claim::Unknown];

    fn all() -> impl Iterator<Item = Facts> {
        let pairs = SANDBOXES.into_iter().flat_map(|sandbox| CLAIMS.map(|claim| (sandbox, claim)));
        let boots =
            pairs.flat_map(|pair| [Boot::Same, Boot::Earlier, Boot::Unknown].map(|boot| (boot, pair)));
        boots.flat_map(|(boot, (sandbox, claim))| {
            [true, false].map(|host_end| Facts { host_end, boot, sandbox, claim })
        })
    }

    #[test]
    fn an_attachment_whose_interface_exists_is_never_touched() {
        assert!(all().filter(|facts| facts.host_end).all(|facts| judge(facts) == Judgement::Keep));
    }

    #[test]
    fn without_objects_nothing_is_touched() {
        let away = all().filter(|facts| facts.claim == Claim::Unknown);
        assert!(away.map(judge).all(|judgement| judgement == Judgement::Keep));
    }

    #[test]
    fn since_a_boot_it_is_dead_at_once() {
        for facts in all().filter(|facts| facts.boot == Boot::Earlier) {
            let expected = if facts.host_end || facts.claim == Claim::Unknown {
                Judgement::Keep
            } else {
                Judgement::Dead
            };
            assert_eq!(judge(facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn in_one_boot_it_takes_interface_path_and_object_and_time() {
        for facts in all().filter(|facts| facts.boot != Boot::Earlier) {
            let is_gone = matches!(facts.sandbox, Sandbox::Other | Sandbox::Missing);
            let is_unclaimed = matches!(facts.claim, Claim::Superseded | Claim::Unclaimed | Claim::Unnamed);
            let suspect = !facts.host_end && is_gone && is_unclaimed;
            assert_eq!(judge(facts), if suspect { Judgement::Suspect } else { Judgement::Keep }, "{facts:?}");
        }
    }
}
