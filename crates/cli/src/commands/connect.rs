//! `drover connect`: standard input and output as one connection.
//!
//! A login host that forbids the forwarding of ports still runs commands, and this is one: what it reads goes to the address,
//! what comes from there it writes, each as soon as it is there.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::fault::{Exit, Fault};

/// How long the connection may take to be made. It goes to this host or to one beside it.
const CONNECT: Duration = Duration::from_secs(10);

/// Carries bytes both ways until the far end has ended its side.
pub(crate) fn run(addr: SocketAddr) -> Result<Exit, Fault> {
    let unreachable = |error: io::Error| {
        Fault::new(Exit::Unreachable, format!("cannot connect to {addr}: {error}"))
            .hint("is what listens there still running?")
    };
    let mut stream = TcpStream::connect_timeout(&addr, CONNECT).map_err(unreachable)?;
    let _ = stream.set_nodelay(true);
    let mut outgoing = stream.try_clone().map_err(unreachable)?;
    let broken = |error: io::Error| Fault::failed(format!("the connection to {addr} broke: {error}"));
    std::thread::Builder::new()
        .name("outgoing".to_owned())
        .spawn(move || {
            // Whoever gave us our input is gone, or the far end reads no more: either way it hears no more of us, and its answer to
            // that is what ends the program.
            let _ = duplicate(&io::stdin()).and_then(|mut input| carry(&mut input, &mut outgoing));
            let _ = outgoing.shutdown(Shutdown::Write);
        })
        .map_err(broken)?;
    // Past the buffer of the standard output, which waits for line ends.
    let mut output = duplicate(&io::stdout()).map_err(broken)?;
    carry(&mut stream, &mut output).map_err(broken)?;
    Ok(Exit::Done)
}

/// Not `io::copy`: that lets the kernel move the bytes, which then waits for more of them before it sends the last ones, and here
/// the last ones are a question that somebody waits to have answered.
fn carry(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => to.write_all(&buffer[..read])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn duplicate(standard: &impl AsFd) -> io::Result<std::fs::File> {
    let own: OwnedFd = standard.as_fd().try_clone_to_owned()?;
    Ok(own.into())
}
