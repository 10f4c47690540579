//! Servers that tell whom they see, and clients that ask them, in network namespaces.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Netns, inside};

const PATIENCE: Duration = Duration::from_millis(700);

/// Answers on a TCP and a UDP port with its name and the client's address, until it is dropped.
pub struct Server {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// `address` is one of the namespace's, or all.
    pub fn new(netns: &Netns, name: &str, address: &str) -> Self {
        let (address, name): (SocketAddr, _) = (address.parse().unwrap(), name.to_owned());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let ended = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&ended);
        let thread = inside(netns, move || {
            let (tcp, udp) = (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap());
            tcp.set_nonblocking(true).unwrap();
            udp.set_nonblocking(true).unwrap();
            ready.send(()).unwrap();
            while !stop.load(Ordering::Relaxed) {
                if let Ok((mut stream, client)) = tcp.accept() {
                    let _ = stream.write_all(format!("{name} {}", client.ip().to_canonical()).as_bytes());
                }
                if let Ok((_, client)) = udp.recv_from(&mut [0; 64]) {
                    let _ = udp.send_to(format!("{name} {}", client.ip().to_canonical()).as_bytes(), client);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        is_ready.recv().unwrap();
        Self { ended, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// What a server tells a client from `netns` over TCP; `None` if nobody answers.
pub fn ask_tcp(netns: &Netns, to: &str) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    let client = inside(netns, move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    });
    client.join().unwrap()
}

/// The same over UDP, from a port of its own.
pub fn ask_udp(netns: &Netns, to: &str) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    let client = inside(netns, move || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        ask_from(&UdpSocket::bind(any).unwrap(), to)
    });
    client.join().unwrap()
}

/// The same from a socket.
pub fn ask_from(socket: &UdpSocket, to: SocketAddr) -> Option<String> {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(b"?", to).ok()?;
    let mut text = [0; 64];
    // An ICMP error of an earlier datagram is told once.
    let (length, _) = socket.recv_from(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text[..length]).into_owned())
}
