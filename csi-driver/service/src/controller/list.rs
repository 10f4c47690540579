//! ListVolumes, GetCapacity, ValidateVolumeCapabilities: questions that change nothing.

use std::fmt::Display;
use std::str::FromStr;

use holdfast_proto::csi::list_volumes_response::{Entry, VolumeStatus};
use holdfast_proto::csi::validate_volume_capabilities_response::Confirmed;
use holdfast_proto::csi::{
    GetCapacityRequest, GetCapacityResponse, ListVolumesRequest, ListVolumesResponse,
    ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse,
};
use holdfast_storage_core::ids::REGION_BYTES;
use holdfast_storage_core::placement;
use tonic::Status;

use super::Inner;
use super::create::to_csi;
use crate::mutable_params::Changes;
use crate::status::from_store;
use crate::topology;
use crate::volume_request::{
    Access, SIZE_BYTES_MIN, check_access, check_capabilities, existing_volume_id, parse_params,
    without_sidecars_keys,
};

/// Objects in one answer where the caller sets no limit; the rest follows by token.
const PAGE_MAX: usize = 4096;

impl Inner {
    pub(super) async fn list_volumes(
        &self,
        request: ListVolumesRequest,
    ) -> Result<ListVolumesResponse, Status> {
        let size = page_size(request.max_entries)?;
        let all = self.store.list().await.map_err(from_store)?;
        let live = all.iter().map(|found| &found.record).filter(|record| !record.is_gone());
        let records = live.map(|record| (record.volume_id, record)).collect();
        let (records, next_token) = page_of(records, &request.starting_token, size)?;
        let entries = records
            .iter()
            .map(|(_, record)| Entry {
                volume: Some(to_csi(record)),
                status: Some(VolumeStatus {
                    published_node_ids: record.attached_to.iter().map(|node| node.0.clone()).collect(),
                }),
            })
            .collect();
        Ok(ListVolumesResponse { entries, next_token })
    }

    /// The largest volume that can be made now: with n replicas, the n-th roomiest pool decides.
    pub(super) async fn get_capacity(
        &self,
        request: GetCapacityRequest,
    ) -> Result<GetCapacityResponse, Status> {
        let access = if request.volume_capabilities.is_empty() {
            Access { block: false, fs_type: None }
        } else {
            match check_capabilities(&request.volume_capabilities) {
                Ok(access) => access,
                // No space for volumes that cannot be made.
                Err(_) => return Ok(GetCapacityResponse::default()),
            }
        };
        let params = parse_params(&without_sidecars_keys(&request.parameters), &access)?;
        if let Some(topology) = &request.accessible_topology {
            topology::check_keys("accessible_topology", topology)?;
            // What is anywhere is for all nodes; but nothing is for a place where there are none.
            if !topology::exists(topology, &self.book) {
                return Ok(GetCapacityResponse::default());
            }
        }
        let spaces = self.spaces(&self.free_space().await?);
        let largest =
            placement::largest(&params.placement, params.replicas, &spaces) / REGION_BYTES * REGION_BYTES;
        let largest = i64::try_from(largest).unwrap_or(i64::MAX);
        Ok(GetCapacityResponse {
            available_capacity: largest,
            maximum_volume_size: Some(largest),
            minimum_volume_size: i64::try_from(SIZE_BYTES_MIN).ok(),
        })
    }

    pub(super) async fn validate(
        &self,
        request: ValidateVolumeCapabilitiesRequest,
    ) -> Result<ValidateVolumeCapabilitiesResponse, Status> {
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("volume_id is missing"));
        }
        if request.volume_capabilities.is_empty() {
            return Err(Status::invalid_argument("volume_capabilities is missing"));
        }
        let volume = existing_volume_id(&request.volume_id)?;
        let record = self.live(volume).await?;
        let judged = check_capabilities(&request.volume_capabilities).and_then(|access| {
            check_access(&record, &access)?;
            let mutable = Changes::parse(&request.mutable_parameters)?;
            let asked = if request.parameters.is_empty() {
                record.params.clone()
            } else {
                parse_params(&request.parameters, &access)?
            };
            if mutable.apply("mutable_parameters", &asked)? != record.params {
                return Err(Status::invalid_argument("parameters: the volume was made with others"));
            }
            Ok(())
        });
        Ok(match judged {
            Ok(()) => ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: request.mutable_parameters,
                }),
                message: String::new(),
            },
            Err(status) => {
                ValidateVolumeCapabilitiesResponse { confirmed: None, message: status.message().to_owned() }
            }
        })
    }
}

/// How many objects a caller wants at most in one answer.
pub(super) fn page_size(max_entries: i32) -> Result<usize, Status> {
    let wanted = usize::try_from(max_entries)
        .map_err(|_| Status::invalid_argument(format!("max_entries is negative ({max_entries})")))?;
    Ok(if wanted == 0 { PAGE_MAX } else { wanted.min(PAGE_MAX) })
}

/// One page of a list, in order of ids, and the token of the next one. A token is the last id of the page before, so it
/// stays good while objects come and go.
pub(super) fn page_of<I: Ord + Copy + Display + FromStr, T>(
    mut all: Vec<(I, T)>,
    starting_token: &str,
    size: usize,
) -> Result<(Vec<(I, T)>, String), Status> {
    let after: Option<I> = match starting_token {
        "" => None,
        token => Some(token.parse().map_err(|_| {
            let shown: String = token.chars().take(64).collect();
            Status::aborted(format!(
                "starting_token: \"{shown}\" is no token of this plugin; list from the start"
            ))
        })?),
    };
    all.sort_by_key(|(id, _)| *id);
    all.retain(|(id, _)| after.is_none_or(|after| *id > after));
    let more = all.len() > size;
    all.truncate(size);
    let next_token = match all.last() {
        Some((last, _)) if more => last.to_string(),
        _ => String::new(),
    };
    Ok((all, next_token))
}
