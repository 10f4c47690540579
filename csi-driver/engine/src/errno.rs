//! Error numbers as block I/O carries them.

use nix::errno::Errno;

pub const EPERM: i32 = Errno::EPERM as i32;
pub const EIO: i32 = Errno::EIO as i32;
pub const EINVAL: i32 = Errno::EINVAL as i32;
pub const ENOSPC: i32 = Errno::ENOSPC as i32;
pub const ENOTCONN: i32 = Errno::ENOTCONN as i32;
pub const ESHUTDOWN: i32 = Errno::ESHUTDOWN as i32;
