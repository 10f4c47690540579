//! Limits of pods' rates: token buckets of the kernel (tbf).
//!
//! ```text
//! to the pod:   ... --> host end of the veth [tbf] --> pod
//! from the pod: pod --> host end of the veth [ingress: redirect] --> ifb [tbf] --> back to where it came in
//! ```
//!
//! A queue can delay only what leaves by an interface. What a pod sends comes in, so it is led through an interface of its own, the ifb,
//! and goes on as if it had just arrived. Dropping it at once instead (police) would need no interface, and makes TCP
//! lose whole windows. The ifb does not vanish with the veth: whoever removes an attachment removes it by its name.

use std::collections::BTreeSet;

use futures::StreamExt;
use holdfast_net_core::bandwidth::{Rate, host_of_ifb, ifb_name};
use holdfast_net_core::plan::EndpointPlan;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::InfoKind;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirrorOption, TcActionOption, TcAttribute, TcFilterU32Option,
    TcHandle, TcMessage, TcOption,
};
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Nla,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use crate::error::{Error, Result};
use crate::links::{Links, name_of, set_sysctl};
use crate::nft::wire::{Attrs, from_host32, from_host64, host32, host64};
use crate::node::kind_of;

const KIND: &str = "tbf";
/// TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST
const PARMS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;
/// Where `struct tc_tbf_qopt` has the rate, bytes per second.
const RATE_AT: usize = 8;
/// TC_LINKLAYER_ETHERNET
const LINKLAYER_ETHERNET: u8 = 1;
/// The handle of the ingress queue, by which filters name it.
const INGRESS: u32 = 0xffff_0000;
/// ETH_P_ALL
const ALL_PROTOCOLS: u16 = 0x0003;

/// Puts an attachment's limits on its new host end, whose index is `index`.
pub async fn apply(links: &Links, plan: &EndpointPlan, index: u32) -> Result<()> {
    if let Some(rate) = plan.bandwidth.ingress {
        set_rate(links, index, rate, &plan.host_ifname).await?;
    }
    let Some(rate) = plan.bandwidth.egress else { return Ok(()) };
    let name = ifb_of(plan)?;
    let mut message = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Ifb);
    message = message.name(name.clone()).mtu(plan.mtu);
    links.add_link(message.build(), &format!("make {name}")).await?;
    let ifb = links.link(&name).await?;
    let ifb =
        ifb.ok_or_else(|| Error::Protocol(format!("{name} vanished while it was set up")))?.header.index;
    // It has no traffic of its own.
    set_sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
    set_rate(links, ifb, rate, &name).await?;
    links.set_up(ifb, &name).await?;
    redirect(links, index, ifb, plan).await
}

fn ifb_of(plan: &EndpointPlan) -> Result<String> {
    let name = ifb_name(&plan.host_ifname);
    name.ok_or_else(|| Error::Config(format!("{} is none of our names", plan.host_ifname)))
}

/// Sends what comes in at `from` out of `to`.
async fn redirect(links: &Links, from: u32, to: u32, plan: &EndpointPlan) -> Result<()> {
    let what = format!("redirect what {} receives", plan.host_ifname);
    let mut queue = on(from);
    (queue.header.parent, queue.header.handle) = (TcHandle::INGRESS, TcHandle::from(INGRESS));
    queue.attributes.push(TcAttribute::Kind("ingress".to_string()));
    send(links, RouteNetlinkMessage::NewQueueDiscipline(queue), NLM_F_CREATE, &what).await?;
    let filter = links.handle().traffic_filter(from.cast_signed()).add().parent(INGRESS);
    let filter = filter.priority(1).protocol(ALL_PROTOCOLS.to_be()).redirect(to);
    let refused = |error: rtnetlink::Error| crate::links::refused(what.clone(), error);
    filter.map_err(refused)?.execute().await.map_err(refused)
}

async fn set_rate(links: &Links, index: u32, rate: Rate, name: &str) -> Result<()> {
    let mut message = on(index);
    message.header.parent = TcHandle::ROOT;
    message.attributes.extend([TcAttribute::Kind(KIND.to_string()), TcAttribute::Options(options(rate))]);
    let what = format!("limit the rate of {name}");
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    send(links, RouteNetlinkMessage::NewQueueDiscipline(message), flags, &what).await
}

fn on(index: u32) -> TcMessage {
    TcMessage::with_index(index.cast_signed())
}

/// `struct tc_tbf_qopt` (`linux/pkt_sched.h`) and what has no room in it.
fn options(rate: Rate) -> Vec<TcOption> {
    let low = u32::try_from(rate.bytes_per_s()).unwrap_or(u32::MAX);
    let mut parms = vec![0, LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    parms.extend(host32(low));
    // No peak rate; the burst is told in bytes below, not in ticks.
    parms.extend([0; 12]);
    parms.extend(host32(rate.queue_bytes()));
    parms.extend([0; 8]);
    let mut options = vec![
        TcOption::Other(DefaultNla::new(PARMS, parms)),
        TcOption::Other(DefaultNla::new(BURST, host32(rate.burst_bytes()).to_vec())),
    ];
    if u64::from(low) != rate.bytes_per_s() {
        options.push(TcOption::Other(DefaultNla::new(RATE64, host64(rate.bytes_per_s()).to_vec())));
    }
    options
}

async fn send(links: &Links, message: RouteNetlinkMessage, flags: u16, what: &str) -> Result<()> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let closed = |_| Error::Protocol(format!("{what}: the connection to rtnetlink ended"));
    let mut answers = links.handle().clone().request(request).map_err(closed)?;
    while let Some(answer) = answers.next().await {
        let NetlinkPayload::Error(error) = answer.payload else { continue };
        let errno = error.raw_code().abs();
        if errno != 0 {
            let reason = std::io::Error::from_raw_os_error(errno).to_string();
            return Err(Error::Link { what: what.to_string(), reason, errno });
        }
    }
    Ok(())
}

/// Compares an attachment's limits with the kernel; `index` is its host end's.
pub async fn check(links: &Links, plan: &EndpointPlan, index: u32) -> Result<()> {
    let limits = plan.bandwidth;
    if limits.ingress.is_none() && limits.egress.is_none() {
        return Ok(());
    }
    let queues = queues(links).await?;
    let differs = |what: String| Err(Error::Differs(what));
    if limits.ingress.is_some_and(|rate| !has_rate(&queues, index, rate)) {
        return differs(format!("the rate to the pod, of {}, is not limited as asked for", plan.host_ifname));
    }
    let Some(rate) = limits.egress else { return Ok(()) };
    let name = ifb_of(plan)?;
    let Some(ifb) = links.link(&name).await?.map(|link| link.header.index) else {
        return differs(format!("{name}, through which the pod's traffic goes, is missing"));
    };
    if !has_rate(&queues, ifb, rate) {
        return differs(format!("the rate from the pod, of {name}, is not limited as asked for"));
    }
    let mut query = on(index);
    query.header.parent = TcHandle::from(INGRESS);
    let filters = links.dumps().run(RouteNetlinkMessage::GetTrafficFilter(query), "list filters").await?;
    let leads = filters.iter().any(|message| match message {
        RouteNetlinkMessage::NewTrafficFilter(filter) => leads_to(filter, ifb),
        _ => false,
    });
    if leads { Ok(()) } else { differs(format!("what the pod sends is not led through {name}")) }
}

async fn queues(links: &Links) -> Result<Vec<TcMessage>> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
    let found = links.dumps().run(request, "list queues").await?;
    let queue = |message| match message {
        RouteNetlinkMessage::NewQueueDiscipline(queue) => Some(queue),
        _ => None,
    };
    Ok(found.into_iter().filter_map(queue).collect())
}

fn has_rate(queues: &[TcMessage], index: u32, rate: Rate) -> bool {
    let is_root = |queue: &&TcMessage| {
        queue.header.index == index.cast_signed()
            && queue.header.parent == TcHandle::ROOT
            && queue.attributes.contains(&TcAttribute::Kind(KIND.to_string()))
    };
    queues.iter().find(is_root).and_then(rate_of) == Some(rate.bytes_per_s())
}

/// Bytes per second of a token bucket.
fn rate_of(queue: &TcMessage) -> Option<u64> {
    // The library does not know this kind: its options are left as they came, as one.
    let options = queue.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => match options.as_slice() {
            [TcOption::Other(nla)] => Some(value_of(nla)),
            _ => None,
        },
        _ => None,
    })?;
    let options = Attrs::of(&options);
    if let Some(rate) = options.find(RATE64) {
        return Some(from_host64(rate.try_into().ok()?));
    }
    let low = options.find(PARMS)?.get(RATE_AT..RATE_AT + 4)?.try_into().ok()?;
    Some(u64::from(from_host32(low)))
}

fn value_of(nla: &impl Nla) -> Vec<u8> {
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    bytes
}

fn leads_to(filter: &TcMessage, ifb: u32) -> bool {
    let actions = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let actions = actions.flatten().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    actions.flatten().any(|action| mirrors_to(action, ifb))
}

fn mirrors_to(action: &TcAction, ifb: u32) -> bool {
    action.attributes.iter().any(|attribute| match attribute {
        TcActionAttribute::Options(options) => options.iter().any(|option| {
            matches!(option, TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) if mirror.ifindex == ifb)
        }),
        _ => false,
    })
}

/// Removes what outlives the host end.
pub async fn remove(links: &Links, host_ifname: &str) -> Result<()> {
    let Some(name) = ifb_name(host_ifname) else { return Ok(()) };
    match links.link(&name).await? {
        Some(link) => links.delete_link(link.header.index, &name).await,
        None => Ok(()),
    }
}

/// Removes interfaces of limits that are of none of the host ends `known`; tells how many.
pub async fn sweep(links: &Links, known: &BTreeSet<String>) -> Result<usize> {
    let mut swept = 0;
    for link in links.all_links().await? {
        let Some(name) = name_of(&link).filter(|_| kind_of(&link) == Some(&InfoKind::Ifb)) else { continue };
        if host_of_ifb(name).is_some_and(|host| !known.contains(&host)) {
            links.delete_link(link.header.index, name).await?;
            swept += 1;
        }
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::Emitable;

    use super::*;

    /// Bytes that `strace tc qdisc replace dev X root tbf rate 8mbit burst 100000 latency 25ms` writes for what is set here; ticks and
    /// tables, which the kernel derives by itself, are left out. Little-endian hosts.
    #[test]
    #[cfg(target_endian = "little")]
    fn a_token_bucket_is_told_as_tc_does() {
        let bytes = |option: &TcOption| (option.kind(), value_of(option));
        let told = options(Rate::new(8_000_000, 800_000).unwrap());
        let mut parms = vec![0, 1, 0, 0, 0, 0, 0, 0, 0x40, 0x42, 0x0f, 0];
        parms.extend([0; 12]);
        parms.extend([0x48, 0xe8, 0x01, 0]);
        parms.extend([0; 8]);
        let burst = vec![0xa0, 0x86, 0x01, 0];
        assert_eq!(told.iter().map(bytes).collect::<Vec<_>>(), [(PARMS, parms), (BURST, burst)]);
        let fast = options(Rate::new(80_000_000_000, 800_000).unwrap());
        assert_eq!(bytes(&fast[2]), (RATE64, vec![0, 0xe4, 0x0b, 0x54, 0x02, 0, 0, 0]));
    }

    #[test]
    fn the_rate_that_is_told_is_the_one_that_is_read() {
        for bits in [8_000_000, 80_000_000_000] {
            let rate = Rate::new(bits, 800_000).unwrap();
            let wanted = options(rate);
            let told = wanted.iter().flat_map(|option| {
                let mut bytes = vec![0; option.buffer_len()];
                option.emit(&mut bytes);
                bytes
            });
            let mut queue = on(7);
            queue.header.parent = TcHandle::ROOT;
            let told = vec![TcOption::Other(DefaultNla::new(2, told.collect()))];
            queue.attributes = vec![TcAttribute::Kind(KIND.to_string()), TcAttribute::Options(told)];
            let other = Rate::new(bits + 8, 800_000).unwrap();
            let queues = [queue];
            assert!(
                has_rate(&queues, 7, rate) && !has_rate(&queues, 7, other) && !has_rate(&queues, 8, rate)
            );
        }
    }
}
