//! Which requests are served: pure, so that every rule can be tested.

use crate::payload::PAYLOAD_BYTES_MAX;
use crate::proto::{Command, Framing, RequestHeader, command_flag, errno};

/// What the checks know of the connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) framing: Framing,
    pub(crate) size_bytes: u64,
    pub(crate) block_bytes: u32,
    pub(crate) read_only: bool,
    pub(crate) fast_zero: bool,
    /// At least one metadata context was chosen.
    pub(crate) has_contexts: bool,
}

/// Why a request is refused: an errno, and words for people.
pub(crate) type Refusal = (i32, &'static str);

impl Rules {
    /// Checks a request, whose payload has been read. `len` is the part of the export that it means, which for a block
    /// status request with a payload stands there and not in the header.
    pub(crate) fn check(&self, request: &RequestHeader, len: u64) -> Result<(), Refusal> {
        self.check_flags(request)?;
        let changes = match request.command {
            Command::Flush => return Ok(()),
            Command::Write | Command::Trim | Command::WriteZeroes => true,
            Command::Read | Command::Cache | Command::BlockStatus => false,
            Command::Disconnect | Command::Unknown(_) => return Err((errno::EINVAL, "unknown command")),
        };
        if changes && self.read_only {
            return Err((errno::EPERM, "the export is read-only"));
        }
        if request.command == Command::BlockStatus && !self.has_contexts {
            return Err((errno::EINVAL, "no metadata context was agreed on"));
        }
        if len == 0 && matches!(request.command, Command::Read | Command::BlockStatus) {
            return Err((errno::EINVAL, "an empty range"));
        }
        if request.command == Command::Read && len > u64::from(PAYLOAD_BYTES_MAX) {
            // The specification has EOVERFLOW for those who know of NBD_CMD_FLAG_DF.
            let errno = if self.framing.has_chunks() { errno::EOVERFLOW } else { errno::EINVAL };
            return Err((errno, "the read is too large"));
        }
        self.check_range(request, len)
    }

    fn check_flags(&self, request: &RequestHeader) -> Result<(), Refusal> {
        let extended = self.framing.is_extended();
        let with_payload = request.flags & command_flag::PAYLOAD_LEN != 0;
        let payload_flag = if extended { command_flag::PAYLOAD_LEN } else { 0 };
        let known = command_flag::FUA
            | match request.command {
                Command::Read if self.framing.has_chunks() => command_flag::DF,
                Command::Write => payload_flag,
                Command::WriteZeroes => command_flag::NO_HOLE | command_flag::FAST_ZERO,
                Command::BlockStatus => command_flag::REQ_ONE | payload_flag,
                _ => 0,
            };
        if request.flags & !known != 0 {
            return Err((errno::EINVAL, "a flag that the command does not have"));
        }
        if extended && request.command == Command::Write && !with_payload {
            return Err((errno::EINVAL, "a write without its payload"));
        }
        if request.flags & command_flag::FAST_ZERO != 0 && !self.fast_zero {
            return Err((errno::ENOTSUP, "zeroing is not faster than writing here"));
        }
        Ok(())
    }

    fn check_range(&self, request: &RequestHeader, len: u64) -> Result<(), Refusal> {
        let end = request.offset.checked_add(len);
        if end.is_none_or(|end| end > self.size_bytes) {
            let writes = matches!(request.command, Command::Write | Command::WriteZeroes);
            let errno = if writes { errno::ENOSPC } else { errno::EINVAL };
            return Err((errno, "beyond the end of the export"));
        }
        let mask = u64::from(self.block_bytes) - 1;
        if (request.offset | len) & mask != 0 {
            return Err((errno::EINVAL, "not a multiple of the block size"));
        }
        Ok(())
    }
}

/// The number sent for a device's error: ENOTSUP and EOVERFLOW have meanings of their own in the specification.
pub(crate) fn wire_error(errno: i32, fast_zero: bool) -> u32 {
    match errno {
        errno::ENOTSUP if !fast_zero => errno::to_wire(errno::EINVAL),
        errno::EOVERFLOW => errno::to_wire(errno::EINVAL),
        other => errno::to_wire(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 40;

    fn mk_rules() -> Rules {
        Rules {
            framing: Framing::Extended,
            size_bytes: SIZE,
            block_bytes: 4096,
            read_only: false,
            fast_zero: true,
            has_contexts: true,
        }
    }

    fn refusal(rules: &Rules, command: Command, flags: u16, offset: u64, len: u64) -> Option<i32> {
        let request = RequestHeader { flags, command, cookie: 0, offset, len };
        rules.check(&request, len).err().map(|(errno, _)| errno)
    }

    #[test]
    fn ranges_beyond_the_end_get_the_errors_that_the_specification_names() {
        let rules = mk_rules();
        let payload = command_flag::PAYLOAD_LEN;
        let beyond = |command, flags| refusal(&rules, command, flags, SIZE, 4096);
        assert_eq!(beyond(Command::Read, 0), Some(errno::EINVAL));
        assert_eq!(beyond(Command::Write, payload), Some(errno::ENOSPC));
        assert_eq!(beyond(Command::WriteZeroes, 0), Some(errno::ENOSPC));
        assert_eq!(beyond(Command::Trim, 0), Some(errno::EINVAL));
        assert_eq!(beyond(Command::BlockStatus, 0), Some(errno::EINVAL));
        assert_eq!(beyond(Command::Cache, 0), Some(errno::EINVAL));
        assert_eq!(refusal(&rules, Command::Trim, 0, u64::MAX - 4095, 4096), Some(errno::EINVAL), "overflow");
        assert_eq!(refusal(&rules, Command::Trim, 0, 4096, u64::MAX - 4095), Some(errno::EINVAL), "overflow");
        assert_eq!(refusal(&rules, Command::Trim, 0, 0, SIZE), None, "the whole volume in one request");
    }

    #[test]
    fn each_command_has_its_own_flags() {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, PAYLOAD_LEN, REQ_ONE};
        let rules = mk_rules();
        let all = [FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN, 1 << 6, 1 << 15];
        let expected: [(Command, &[u16]); 7] = [
            (Command::Read, &[FUA, DF]),
            (Command::Write, &[PAYLOAD_LEN]),
            (Command::Flush, &[FUA]),
            (Command::Trim, &[FUA]),
            (Command::Cache, &[FUA]),
            (Command::WriteZeroes, &[FUA, NO_HOLE, FAST_ZERO]),
            (Command::BlockStatus, &[FUA, REQ_ONE, PAYLOAD_LEN]),
        ];
        for (command, taken) in expected {
            for flag in all {
                let refused = refusal(&rules, command, flag, 0, 4096);
                assert_eq!(refused.is_none(), taken.contains(&flag), "{command:?} with {flag:#x}");
                assert!(refused.is_none() || refused == Some(errno::EINVAL));
            }
        }
        assert_eq!(refusal(&rules, Command::Write, FUA | PAYLOAD_LEN, 0, 4096), None);
        assert_eq!(refusal(&rules, Command::Write, 0, 0, 4096), Some(errno::EINVAL), "no payload");
    }

    #[test]
    fn what_was_not_agreed_on_is_refused() {
        let simple = Rules { framing: Framing::Simple, has_contexts: false, ..mk_rules() };
        assert_eq!(refusal(&simple, Command::Read, command_flag::DF, 0, 4096), Some(errno::EINVAL));
        assert_eq!(refusal(&simple, Command::Write, command_flag::PAYLOAD_LEN, 0, 4096), Some(errno::EINVAL));
        assert_eq!(refusal(&simple, Command::BlockStatus, 0, 0, 4096), Some(errno::EINVAL));
        assert_eq!(refusal(&simple, Command::Read, 0, 0, 33 << 20), Some(errno::EINVAL));
        assert_eq!(refusal(&mk_rules(), Command::Read, 0, 0, 33 << 20), Some(errno::EOVERFLOW));
        assert_eq!(refusal(&mk_rules(), Command::Unknown(8), 0, 0, 0), Some(errno::EINVAL));
        let slow = Rules { fast_zero: false, ..mk_rules() };
        assert_eq!(
            refusal(&slow, Command::WriteZeroes, command_flag::FAST_ZERO, 0, 4096),
            Some(errno::ENOTSUP)
        );
        assert_eq!(refusal(&slow, Command::WriteZeroes, 0, 0, 4096), None);
        let read_only = Rules { read_only: true, ..mk_rules() };
        for (command, flags) in
            [(Command::Write, command_flag::PAYLOAD_LEN), (Command::Trim, 0), (Command::WriteZeroes, 0)]
        {
            assert_eq!(refusal(&read_only, command, flags, 0, 4096), Some(errno::EPERM));
        }
        assert_eq!(refusal(&read_only, Command::Read, 0, 0, 4096), None);
    }

    #[test]
    fn errors_with_a_meaning_of_their_own_do_not_leak_from_the_device() {
        assert_eq!(wire_error(errno::ENOTSUP, false), 22);
        assert_eq!(wire_error(errno::ENOTSUP, true), 95);
        assert_eq!(wire_error(errno::EOVERFLOW, true), 22);
        assert_eq!(wire_error(errno::ENOSPC, false), 28);
    }
}
