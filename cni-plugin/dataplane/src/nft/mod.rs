//! nf_tables: our two tables, kept equal to a [`Ruleset`] by one transaction per change.

pub(crate) mod conntrack;
mod elements;
mod expr;
mod foreign;
mod load;
mod nat;
mod nflog;
mod pins;
mod program;
mod reader;
mod removal;
mod skeleton;
pub(crate) mod socket;
pub(crate) mod wire;

use holdfast_net_core::ruleset::{Changes, Element, Ruleset, diff};

use crate::error::{Error, Result};
use crate::{Applied, Config};
use load::Loaded;
use skeleton::Params;
use socket::{Events, NetfilterSocket};

pub use foreign::{ForeignChain, ForeignHook, ForeignRule, ForeignVerdict, foreign_chains};
pub use nflog::{FlowBatch, FlowEvent, FlowLog, FlowVerdict};
pub use reader::{Live, Reader};
pub(crate) use removal::remove_tables;

/// A refused transaction is tried again from the kernel's true state this often: somebody changed our tables between
/// our look and our write. Then the error is the caller's.
const TRIES: usize = 3;
/// The mask must hold at least this many bits, or the revision comes round too often.
const REVISION_BITS_MIN: u32 = 4;

/// The nf_tables side of the data path.
pub struct Nft {
    socket: NetfilterSocket,
    events: Events,
    config: Config,
    /// The policy revision, 1..=revision_max; 0 until known: it is the mark of an entry never judged.
    revision: u32,
    /// What the kernel holds.
    applied: Ruleset,
    /// Handles of the rules that carry the revision: chain, index in it, handle.
    revision_rules: Vec<program::RuleRef>,
    /// The kernel may differ from `applied`; read it before the next write.
    stale: bool,
}

impl Nft {
    /// Adopts our tables, or makes them.
    pub fn open(config: Config) -> Result<Self> {
        check_mask(config.ct_mark_mask)?;
        // Subscribed before the first look, so that no foreign change falls between.
        let events = Events::open()?;
        let socket = NetfilterSocket::open()?;
        let mut nft = Self {
            socket,
            events,
            config,
            revision: 0,
            applied: Ruleset::default(),
            revision_rules: Vec::new(),
            stale: true,
        };
        nft.refresh()?;
        Ok(nft)
    }

    /// What the kernel holds.
    pub fn applied(&self) -> &Ruleset {
        &self.applied
    }

    /// The mask of the revision's bits in the ct mark, and those of a connection that was judged by the rules of now.
    pub fn mark(&self) -> (u32, u32) {
        (self.config.ct_mark_mask, self.params(self.revision).mark)
    }

    /// Packets dropped by policy and by the source pin since the tables were made.
    pub fn denied(&mut self) -> Result<(u64, u64)> {
        load::denied(&mut self.socket, &self.config.table)
    }

    /// Makes the kernel equal to `target`.
    pub fn apply(&mut self, target: &Ruleset) -> Result<Applied> {
        target.validate()?;
        let mut mended = false;
        let mut tries = 0;
        loop {
            self.stale |= self.events.foreign_change(&self.config.table, self.socket.port())?;
            if self.stale {
                mended |= self.refresh()?;
            }
            let changes = diff(&self.applied, target);
            if changes.is_empty() {
                return Ok(Applied { mended, ..Applied::default() });
            }
            match self.write(&changes) {
                Ok(()) => {
                    self.applied = target.clone();
                    let elements = changes.add.len() + changes.remove.len();
                    return Ok(Applied { elements, revoked: changes.revokes, mended });
                }
                Err(error @ Error::Ruleset(_)) => return Err(error),
                Err(error) => {
                    self.stale = true;
                    tries += 1;
                    if tries == TRIES {
                        return Err(error);
                    }
                    tracing::warn!(%error, "policy transaction refused; reading our tables back and trying again");
                }
            }
        }
    }

    /// Makes changes to what the kernel holds; their cost does not grow with the rest. Where somebody else changed our
    /// tables, or the kernel refuses, all of it is compared first.
    pub fn change(&mut self, changes: &Changes) -> Result<Applied> {
        self.stale |= self.events.foreign_change(&self.config.table, self.socket.port())?;
        if !self.stale {
            if changes.is_empty() && !changes.revokes {
                return Ok(Applied::default());
            }
            match self.write(changes) {
                Ok(()) => {
                    self.applied.apply(changes);
                    let elements = changes.add.len() + changes.remove.len();
                    return Ok(Applied { elements, revoked: changes.revokes, mended: false });
                }
                Err(error) => {
                    tracing::warn!(%error, "policy transaction refused; reading our tables back and trying again");
                    self.stale = true;
                }
            }
        }
        let mut target = self.applied.clone();
        target.apply(changes);
        let mut applied = self.apply(&target)?;
        if changes.revokes && !applied.revoked {
            self.write(&Changes { revokes: true, ..Changes::default() })?;
            applied.revoked = true;
        }
        Ok(applied)
    }

    /// Whether a socket other than ours changed our tables since the last look.
    pub fn foreign_change(&mut self) -> Result<bool> {
        self.stale |= self.events.foreign_change(&self.config.table, self.socket.port())?;
        Ok(self.stale)
    }

    /// Becomes readable with every notification, our own changes' among them.
    pub fn notifications(&self) -> Result<std::os::fd::OwnedFd> {
        self.events.descriptor()
    }

    /// The kernel was found to differ without a notification: everything is compared before the next write.
    pub fn distrust(&mut self) {
        self.stale = true;
    }

    /// Reads our tables back if somebody else changed them.
    pub fn refresh_if_changed(&mut self) -> Result<()> {
        if self.foreign_change()? {
            self.refresh()?;
        }
        Ok(())
    }

    /// New profiles go ahead in a transaction of their own, in which nothing refers to them: the kernel swaps a set with ranges
    /// some time after the rest of a transaction is in force, and a packet in between would find its pair and no profile,
    /// which is a deny.
    fn write(&mut self, changes: &Changes) -> Result<()> {
        let (profiles, rest): (Vec<Element>, Vec<Element>) =
            changes.add.iter().cloned().partition(|element| matches!(element, Element::Profile(..)));
        if profiles.is_empty() || (rest.is_empty() && changes.remove.is_empty()) {
            return self.write_at_once(changes);
        }
        self.write_at_once(&Changes { add: profiles, ..Changes::default() })?;
        self.write_at_once(&Changes { remove: changes.remove.clone(), add: rest, revokes: changes.revokes })
    }

    fn write_at_once(&mut self, changes: &Changes) -> Result<()> {
        if !changes.revokes {
            let mut batch = self.socket.batch();
            program::change(&mut batch, &self.config.table, changes);
            return self.socket.commit(batch);
        }
        let next = self.next_revision()?;
        let mut batch = self.socket.batch();
        program::change(&mut batch, &self.config.table, changes);
        program::replace_revision(
            &mut batch,
            &self.config.table,
            &self.revision_rules,
            self.params(next),
            next,
        );
        self.socket.commit(batch)?;
        self.finish_revision(next)
    }

    /// The next revision. Before the numbers come round again, every entry loses its old one.
    fn next_revision(&mut self) -> Result<u32> {
        if self.revision < self.revision_max() {
            return Ok(self.revision + 1);
        }
        conntrack::clear_marks(&mut self.socket, self.config.ct_mark_mask)?;
        Ok(1)
    }

    fn finish_revision(&mut self, next: u32) -> Result<()> {
        let wrapped = next < self.revision;
        self.revision = next;
        if wrapped {
            // Entries judged between the first clearing and the commit carry the highest revision; it must not wait
            // for its next turn. Entries already judged under revision 1 are judged once more, no harm.
            conntrack::clear_marks(&mut self.socket, self.config.ct_mark_mask)?;
        }
        Ok(())
    }

    /// Reads our tables; puts them right if they are not whole. True if something had to be mended or had changed.
    fn refresh(&mut self) -> Result<bool> {
        let found = load::load(&mut self.socket, &self.config.table)?;
        let before = std::mem::take(&mut self.applied);
        match found {
            Loaded::Whole { ruleset, revision, rules } => {
                let changed = !diff(&before, &ruleset).is_empty();
                (self.applied, self.revision, self.revision_rules) = (ruleset, revision, rules);
                self.stale = false;
                Ok(changed)
            }
            Loaded::Absent => {
                self.rebuild(before)?;
                Ok(true)
            }
            Loaded::Damaged { ruleset, reason } => {
                tracing::warn!(
                    reason,
                    "our nf_tables tables are not whole; replacing them in one transaction"
                );
                // What we knew is better than what is left of it.
                let keep = if diff(&Ruleset::default(), &before).is_empty() { ruleset } else { before };
                self.rebuild(keep)?;
                Ok(true)
            }
        }
    }

    /// Where the kernel refuses, `ruleset` is what the next try begins with.
    fn rebuild(&mut self, ruleset: Ruleset) -> Result<()> {
        self.applied = ruleset;
        if self.revision == 0 {
            // Marks of an earlier life of this host must not pass for judged connections.
            conntrack::clear_marks(&mut self.socket, self.config.ct_mark_mask)?;
        }
        let next = self.next_revision()?;
        let mut batch = self.socket.batch();
        program::rebuild(&mut batch, &self.config.table, &self.applied, self.params(next), next);
        self.socket.commit(batch)?;
        self.finish_revision(next)?;
        self.revision_rules = load::revision_rules(&mut self.socket, &self.config.table)?;
        self.stale = false;
        Ok(())
    }

    fn params(&self, revision: u32) -> Params {
        let mask = self.config.ct_mark_mask;
        Params { mask, mark: revision << mask.trailing_zeros(), log_group: self.config.log_group }
    }

    fn revision_max(&self) -> u32 {
        self.config.ct_mark_mask >> self.config.ct_mark_mask.trailing_zeros()
    }
}

fn check_mask(mask: u32) -> Result<()> {
    let run = mask >> mask.trailing_zeros().min(31);
    if run.count_ones() < REVISION_BITS_MIN || run & run.wrapping_add(1) != 0 {
        return Err(Error::Config(format!(
            "ct mark mask {mask:#010x} is not one run of at least {REVISION_BITS_MIN} bits"
        )));
    }
    Ok(())
}

#[cfg(test)]
fn program_test_element(address: &str) -> holdfast_net_core::ruleset::Element {
    use holdfast_net_core::ruleset::{Element, IdentityId};
    Element::Ident(address.parse().unwrap(), IdentityId(5))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use holdfast_net_core::plan::MacAddr;
    use holdfast_net_core::ports::{PortRule, Proto};
    use holdfast_net_core::ruleset::{AddrRange, ClassId, Element, IdentityId, Pin, ProfileId, Ruleset};

    use super::{Nft, check_mask};
    use crate::Config;

    /// Runs `test` in a network namespace of its own, which vanishes with its thread.
    pub(super) fn in_own_netns(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests run as root");
            test();
        });
        thread.join().unwrap();
    }

    pub(super) fn nft_text(args: &[&str]) -> String {
        let out = Command::new("nft").args(args).output().expect("nft is installed");
        assert!(out.status.success(), "nft {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    fn mk_ruleset() -> Ruleset {
        let ip = |text: &str| text.parse().unwrap();
        let mut r = Ruleset::default();
        for (a, n) in [("10.0.0.1", 2), ("fd00::1", 3)] {
            r.cls_in.insert(ip(a), ClassId(n));
            r.cls_eg.insert(ip(a), ClassId(n));
            r.ident.insert(ip(a), IdentityId(n));
            for routed in [false, true] {
                r.pins.insert(Pin {
                    ifname: "hfv0123456789ab".into(),
                    mac: MacAddr([2, 0, 0, 0, 0, 9]),
                    address: ip(a),
                    routed,
                });
            }
        }
        for (first, last, n) in [
            ("10.1.0.0", "10.1.255.255", 5),
            ("10.2.0.0", "10.2.255.255", 6),
            ("255.0.0.0", "255.255.255.255", 8),
            ("fd00::", "fd00::ffff", 5),
        ] {
            r.cidr.insert(AddrRange { first: ip(first), last: ip(last) }, IdentityId(n));
        }
        r.profiles.insert(ProfileId(1), vec![PortRule::All]);
        r.profiles.insert(
            ProfileId(2),
            vec![PortRule::Ports { proto: Proto::Tcp, first: 80, last: 90 }, PortRule::port(Proto::Udp, 53)],
        );
        r.pair_in.insert((ClassId(2), IdentityId::ANY), ProfileId(2));
        r.pair_eg.insert((ClassId(3), IdentityId(5)), ProfileId(1));
        r.nat = super::nat::tests::mk_nat();
        r
    }

    #[test]
    fn a_ruleset_is_written_listed_by_stock_nft_and_adopted() {
        in_own_netns(|| {
            let mut nft = Nft::open(Config::default()).unwrap();
            let empty = nft_text(&["list", "ruleset"]);
            assert!(empty.contains("table inet holdfast"), "{empty}");
            let ruleset = mk_ruleset();
            let applied = nft.apply(&ruleset).unwrap();
            assert!(applied.elements > 0 && !applied.mended);
            let text = nft_text(&["list", "ruleset"]);
            println!("{text}");
            for piece in [
                "elements = { 10.0.0.1 : 0x00000002 }",
                // nft 1.0.6 prints the marks of a ranged concatenation byte-swapped, whatever the userdata say.
                "0x02000000 . tcp . 80-90 : return",
                "0x01000000 . 0-255 . 0-65535 : return",
                "* : goto deny",
                "10.1.0.0/16 : 0x00000005",
                "\"hfv0123456789ab\" . 02:00:00:00:00:09 . 10.0.0.1",
                "ct mark & 0x00ff0000 == 0x00010000 accept",
                "tcp . 8080 : 10.0.0.1 . 80",
                "192.0.2.1 . udp . 53 : 10.0.0.1 . 5353",
                "sctp . 8080 : fd00::1 . 80",
                "elements = { 10.0.0.1 . 10.0.0.1 }",
                "elements = { 10.0.0.0/16, 255.0.0.0/8 }",
                "type nat hook prerouting priority dstnat",
                "fib daddr type local",
                "masquerade fully-random",
            ] {
                assert!(text.contains(piece), "missing {piece:?}");
            }
            nft_text(&["-j", "list", "ruleset"]);
            drop(nft);

            let mut again = Nft::open(Config::default()).unwrap();
            assert_eq!(*again.applied(), ruleset);
            assert_eq!(again.apply(&ruleset).unwrap(), crate::Applied::default());
            assert_eq!(nft_text(&["list", "ruleset"]), text, "adopting and re-applying changed something");
        });
    }

    /// A profile that denies everything has no element, so whoever reads the tables back does not find it.
    #[test]
    fn a_pair_that_denies_everything_is_adopted_and_changes_go_on() {
        in_own_netns(|| {
            let mut ruleset = mk_ruleset();
            ruleset.profiles.insert(ProfileId(7), Vec::new());
            ruleset.pair_in.insert((ClassId(2), IdentityId(5)), ProfileId(7));
            Nft::open(Config::default()).unwrap().apply(&ruleset).unwrap();

            let mut nft = Nft::open(Config::default()).unwrap();
            assert_eq!(
                nft.apply(&ruleset).unwrap(),
                crate::Applied::default(),
                "an unchanged state is not written"
            );
            let mut more = nft.applied().clone();
            more.cls_in.insert("10.0.0.9".parse().unwrap(), ClassId::DENY_ALL);
            assert_eq!(nft.apply(&more).unwrap().elements, 1);
        });
    }

    #[test]
    fn a_revoking_change_advances_the_revision_and_it_comes_round() {
        in_own_netns(|| {
            let config = Config { ct_mark_mask: 0x00f0_0000, ..Config::default() };
            let mut nft = Nft::open(config.clone()).unwrap();
            let full = mk_ruleset();
            let mut less = full.clone();
            less.pair_in.clear();
            nft.apply(&full).unwrap();
            for round in 0..40 {
                assert!(nft.apply(&less).unwrap().revoked);
                assert!(!nft.apply(&full).unwrap().revoked);
                let expected = (round % 15 + 1) % 15 + 1;
                assert_eq!(nft.revision, expected);
            }
            let revision = nft.revision;
            drop(nft);
            assert_eq!(Nft::open(config).unwrap().revision, revision, "a restart keeps the revision");
        });
    }

    #[test]
    fn a_flushed_or_damaged_table_is_mended_by_the_next_apply() {
        in_own_netns(|| {
            let mut nft = Nft::open(Config::default()).unwrap();
            let ruleset = mk_ruleset();
            nft.apply(&ruleset).unwrap();
            for tamper in [
                &["flush", "ruleset"][..],
                &["delete", "table", "bridge", "holdfast"],
                &["flush", "chain", "inet", "holdfast", "ingress"],
                &["delete", "element", "inet", "holdfast", "ident4", "{ 10.0.0.1 }"],
                &["add", "element", "inet", "holdfast", "ident4", "{ 10.0.0.77 : 0x5 }"],
                &["flush", "map", "inet", "holdfast", "hostport4"],
                &["flush", "set", "inet", "holdfast", "exempt4"],
                &["flush", "chain", "inet", "holdfast", "sources"],
            ] {
                nft_text(tamper);
                assert!(nft.foreign_change().unwrap(), "{tamper:?} went unnoticed");
                assert!(nft.apply(&ruleset).unwrap().mended, "{tamper:?} was not mended");
                assert_eq!(*Nft::open(Config::default()).unwrap().applied(), ruleset, "{tamper:?}");
                assert!(!nft.foreign_change().unwrap());
            }
        });
    }

    #[test]
    fn a_hundred_thousand_elements_fit_one_transaction() {
        in_own_netns(|| {
            let mut nft = Nft::open(Config::default()).unwrap();
            let mut ruleset = mk_ruleset();
            for n in 0..100_000u32 {
                let address = std::net::Ipv4Addr::from(0x0b00_0000 + n);
                ruleset.ident.insert(address.into(), IdentityId(5 + n % 100));
            }
            nft.apply(&ruleset).unwrap();
            assert_eq!(*Nft::open(Config::default()).unwrap().applied(), ruleset);
        });
    }

    #[test]
    fn a_refused_transaction_changes_nothing_and_names_the_message() {
        in_own_netns(|| {
            let mut nft = Nft::open(Config::default()).unwrap();
            nft.apply(&mk_ruleset()).unwrap();
            let before = nft_text(&["list", "ruleset"]);
            let mut batch = nft.socket.batch();
            let mut changes = super::Changes::default();
            changes.add.push(super::program_test_element("10.0.0.200"));
            changes.remove.push(super::program_test_element("10.0.0.99"));
            super::program::change(&mut batch, "holdfast", &changes);
            let error = nft.socket.commit(batch).unwrap_err();
            assert!(
                matches!(&error, crate::Error::Nft { what, errno: libc::ENOENT } if what == "remove elements from ident4"),
                "{error}"
            );
            assert_eq!(nft_text(&["list", "ruleset"]), before);
        });
    }

    #[test]
    fn a_change_that_the_kernel_refuses_leaves_the_rules_and_the_next_one_is_made() {
        in_own_netns(|| {
            let mut nft = Nft::open(Config::default()).unwrap();
            nft.apply(&mk_ruleset()).unwrap();
            let before = nft_text(&["list", "ruleset"]);
            let ip = |text: &str| text.parse().unwrap();
            // It lies across the border of two ranges that are there.
            let across = AddrRange { first: ip("10.1.255.0"), last: ip("10.2.0.255") };
            let mut bad = super::Changes::default();
            bad.add.push(Element::Cidr(across, IdentityId(9)));
            bad.add.push(super::program_test_element("10.0.0.200"));
            let error = nft.change(&bad).unwrap_err();
            assert!(error.to_string().contains("invalid ruleset"), "{error}");
            assert_eq!(nft_text(&["list", "ruleset"]), before);

            let mut good = super::Changes::default();
            good.add.push(super::program_test_element("10.0.0.200"));
            assert_eq!(nft.change(&good).unwrap().elements, 1);
            assert!(nft_text(&["list", "map", "inet", "holdfast", "ident4"]).contains("10.0.0.200"));
        });
    }

    #[test]
    fn a_mark_mask_is_one_run_of_bits() {
        assert!(check_mask(0x00ff_0000).is_ok());
        assert!(check_mask(0xffff_ffff).is_ok());
        assert!(check_mask(0xf).is_ok());
        assert!(check_mask(0).is_err());
        assert!(check_mask(0x7).is_err());
        assert!(check_mask(0x00f0_f000).is_err());
    }
}
