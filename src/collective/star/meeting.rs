//! How ranks meet: rank 0 listens, and the others call until it answers, in any order, up to a time limit. Each says its
//! number, how many ranks it expects, its job and its version. One that does not fit is named, and nobody goes on
//! waiting for a rank that cannot come any more.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::channel;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::{CollectiveError, World, list};
use super::{GREETING, MAX_TEXT};
use crate::system;

/// The first bytes of a call, so that nobody takes another service for a rank.
const MAGIC: &[u8; 8] = b"edm2krnk";
/// How long nothing is said of whom a rank waits for.
const QUIET: Duration = Duration::from_secs(5);

/// What a rank has once all have come.
pub(super) struct Met {
    /// Sockets for messages, in the order of the ranks at the other end.
    pub links: Vec<TcpStream>,
    /// Sockets for watching, in the same order.
    pub watches: Vec<TcpStream>,
    /// The names of all ranks.
    pub names: Vec<String>,
}

/// What a rank says when it calls.
#[derive(Serialize, Deserialize)]
struct Hello {
    version: String,
    job: String,
    rank: usize,
    size: usize,
    watch: bool,
    /// Machine and process, for people.
    name: String,
}

/// The answer to a call, once all ranks have come.
#[derive(Serialize, Deserialize)]
enum Reply {
    /// The names of all.
    Welcome(Vec<String>),
    /// Why there will be no meeting.
    Refused(String),
}

fn hello(world: &World, watch: bool) -> Hello {
    let (rank, size, job) = (world.rank, world.size, world.job.clone());
    let name = format!("rank {rank} ({}process {})", host_name(), std::process::id());
    Hello { version: env!("CARGO_PKG_VERSION").into(), job, rank, size, watch, name }
}

fn host_name() -> String {
    system::host_name().map_or(String::new(), |name| format!("{name}, "))
}

fn write_json(mut stream: &TcpStream, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(value)?;
    stream.write_all(&[&MAGIC[..], &(text.len() as u32).to_le_bytes(), &text].concat())
}

fn read_json<T: for<'a> Deserialize<'a>>(mut stream: &TcpStream) -> io::Result<T> {
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let length = u32::from_le_bytes(*head.last_chunk().expect("twelve bytes have four")) as usize;
    if head[..8] != MAGIC[..] || length > MAX_TEXT {
        return Err(io::Error::new(ErrorKind::InvalidData, "what answers there is no edm2k"));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Listens on all of the machine's addresses, unless the address can only mean this machine. What a name resolves to does
/// not tell: to itself, many a machine is 127.0.1.1.
fn listen(world: &World) -> Result<TcpListener, CollectiveError> {
    let World { address, port, .. } = world;
    let listener = match &**address {
        "localhost" | "127.0.0.1" | "::1" => TcpListener::bind((&**address, *port)),
        _ => TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port))),
    };
    listener.map_err(|cause| {
        let what = "another rank 0 or another program is there? EDM2K_PORT sets another port on all ranks";
        CollectiveError::Address(format!("rank 0 cannot listen at {address}:{port}: {cause} ({what})"))
    })
}

/// Rank 0's side.
pub(super) fn host(world: &World, limit: Duration, say: &mut dyn FnMut(&str)) -> Result<Met, CollectiveError> {
    let begun = Instant::now();
    let listener = listen(world)?;
    let broken = |cause: io::Error| CollectiveError::Address(format!("{}:{}: {cause}", world.address, world.port));
    listener.set_nonblocking(true).map_err(broken)?;
    // The two sockets of each other rank: for messages and for watching.
    let mut come: Vec<[Option<TcpStream>; 2]> = (1..world.size).map(|_| [None, None]).collect();
    let mut names = vec![hello(world, false).name];
    names.resize(world.size, String::new());
    let mut said = false;
    let (sender, callers) = channel::<(TcpStream, Hello)>();
    let result = loop {
        for (place, name) in come.iter_mut().zip(&mut names[1..]) {
            // Whoever has ended leaves its place to a process that is started instead.
            if place.iter().flatten().any(is_gone) {
                (*place, *name) = ([None, None], String::new());
            }
        }
        if come.iter().flatten().all(Option::is_some) {
            break Ok(());
        }
        let missing = || (1..world.size).filter(|rank| come[rank - 1].iter().any(Option::is_none)).collect::<Vec<_>>();
        if begun.elapsed() > limit {
            let who = missing();
            break Err(CollectiveError::Missing { missing: who.len(), size: world.size, who, limit });
        }
        if begun.elapsed() > QUIET && !said {
            said = true;
            let World { address, port, said_by, size, .. } = world;
            say(&format!(
                "waiting at {address}:{port} for {} ({said_by} says that there are {size} ranks)",
                list(&missing())
            ));
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let sender = sender.clone();
                // Each caller is read in a thread of its own, so that one who says nothing holds up nobody.
                std::thread::spawn(move || {
                    let greeting = stream
                        .set_nonblocking(false)
                        .and_then(|()| stream.set_read_timeout(Some(GREETING)))
                        .and_then(|()| read_json(&stream));
                    greeting.map(|hello| sender.send((stream, hello)))
                });
            }
            // Nobody calls at the moment, or a caller has gone already.
            Err(_) => sleep(Duration::from_millis(10)),
        }
        let Ok((stream, caller)) = callers.try_recv() else { continue };
        if caller.job != world.job {
            let why = format!("it belongs to job '{}', {} to job '{}'", world.job, caller.name, caller.job);
            let _ = write_json(&stream, &Reply::Refused(why));
            continue;
        }
        if let Err(why) = fits(world, &caller, &come, &names) {
            let _ = write_json(&stream, &Reply::Refused(why.clone()));
            break Err(CollectiveError::Unfit(why));
        }
        names[caller.rank] = caller.name;
        come[caller.rank - 1][usize::from(caller.watch)] = Some(stream);
    };
    let answer = match &result {
        Ok(()) => Reply::Welcome(names.clone()),
        Err(why) => Reply::Refused(why.to_string()),
    };
    // All are told, though one may have ended since it came.
    let mut told = Ok(());
    for ([link, _], name) in come.iter().zip(&names[1..]) {
        if let Some(Err(cause)) = link.as_ref().map(|link| write_json(link, &answer)) {
            told = Err(CollectiveError::Lost(format!("{name} has ended ({cause})")));
        }
    }
    result?;
    told?;
    let (mut links, mut watches) = (Vec::new(), Vec::new());
    for [link, watch] in come {
        links.extend(link);
        watches.extend(watch);
    }
    for stream in &links {
        stream.set_read_timeout(None).and_then(|()| stream.set_nodelay(true)).map_err(broken)?;
    }
    Ok(Met { links, watches, names })
}

/// Whether nobody is at the other end any more; a caller that waits for an answer sends nothing.
fn is_gone(stream: &TcpStream) -> bool {
    let peeked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let blocking = stream.set_nonblocking(false);
    blocking.is_err() || !matches!(peeked, Err(why) if why.kind() == ErrorKind::WouldBlock)
}

/// Why a caller is none of the ranks that are still missing.
fn fits(world: &World, caller: &Hello, come: &[[Option<TcpStream>; 2]], names: &[String]) -> Result<(), String> {
    let Hello { version, rank, size, watch, name, .. } = caller;
    let own = env!("CARGO_PKG_VERSION");
    if version != own {
        return Err(format!("{name} is edm2k {version}, rank 0 is {own}"));
    }
    if *size != world.size {
        return Err(format!("{name} counts {size} ranks, rank 0 counts {}", world.size));
    }
    if *rank == 0 || *rank >= world.size {
        return Err(format!("{name} calls rank 0, expected rank 1 to {}", world.size - 1));
    }
    if come[rank - 1][usize::from(*watch)].is_some() || (!names[*rank].is_empty() && names[*rank] != *name) {
        return Err(format!("two processes have the same number: {} and {name}", names[*rank]));
    }
    Ok(())
}

/// The side of the others.
pub(super) fn call(world: &World, limit: Duration, say: &mut dyn FnMut(&str)) -> Result<Met, CollectiveError> {
    let World { rank, address, port, said_by, size, .. } = world;
    let begun = Instant::now();
    let mut said = false;
    let mut waits = |whom: &str| {
        if begun.elapsed() > QUIET && !said {
            said = true;
            say(&format!("waiting for {whom} at {address}:{port} ({said_by} says that there are {size} ranks)"));
        }
    };
    let dial = || -> io::Result<TcpStream> {
        let mut last = io::Error::new(ErrorKind::NotFound, "no such machine");
        for place in (&**address, *port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&place, Duration::from_secs(5)) {
                // Where nobody listens, a socket may be given that very port as its own, and then connect to itself.
                Ok(stream) if stream.local_addr().ok() != stream.peer_addr().ok() => return Ok(stream),
                Ok(_) => last = ErrorKind::ConnectionRefused.into(),
                Err(why) => last = why,
            }
        }
        Err(last)
    };
    let link = loop {
        match dial() {
            Ok(stream) => break stream,
            Err(cause) if begun.elapsed() > limit => {
                let seconds = limit.as_secs();
                let what = format!("rank {rank} found no rank 0 at {address}:{port} within {seconds} s: {cause}");
                return Err(CollectiveError::Address(what));
            }
            Err(_) => {
                waits("rank 0");
                sleep(Duration::from_millis(100));
            }
        }
    };
    let silent = |cause: &io::Error| matches!(cause.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    let failed = |cause: io::Error| match cause.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            CollectiveError::Lost(format!("rank 0 at {address}:{port} ended before all ranks had come"))
        }
        _ if silent(&cause) => {
            let seconds = begun.elapsed().as_secs();
            let what = "another program may be there; EDM2K_PORT sets another port on all ranks";
            CollectiveError::Address(format!("rank 0 at {address}:{port} said nothing for {seconds} s: {what}"))
        }
        _ => CollectiveError::Address(format!("{address}:{port}: {cause}")),
    };
    write_json(&link, &hello(world, false)).map_err(failed)?;
    let watch = dial().and_then(|watch| write_json(&watch, &hello(world, true)).map(|()| watch));
    // Rank 0 answers once all have come.
    link.set_read_timeout(Some(QUIET)).map_err(failed)?;
    if link.peek(&mut [0]).is_err() {
        waits("the others");
    }
    // It may have begun to wait later than this one.
    link.set_read_timeout(Some(limit + GREETING)).map_err(failed)?;
    // It may have ended since. Then it has said why, on whichever of the two sockets it heard first.
    let answer = read_json(&link).or_else(|cause| {
        let Ok(watch) = &watch else { return Err(cause) };
        if silent(&cause) {
            return Err(cause);
        }
        watch.set_read_timeout(Some(GREETING))?;
        read_json(watch)
    });
    let names = match answer.map_err(failed)? {
        Reply::Welcome(names) if names.len() == world.size => names,
        Reply::Welcome(_) => return Err(CollectiveError::Unfit("rank 0 names others than all ranks".into())),
        Reply::Refused(why) => return Err(CollectiveError::Unfit(format!("rank 0 refuses: {why}"))),
    };
    link.set_read_timeout(None).and_then(|()| link.set_nodelay(true)).map_err(failed)?;
    Ok(Met { links: vec![link], watches: vec![watch.map_err(failed)?], names })
}
