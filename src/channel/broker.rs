//! One socket per VM, on which any number of clients of this user talk to its agent.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_protocol::message::Response;
use serde_json::{json, Map, Value};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};

use super::agent::{patience, Agent};
use super::attach::VERSION;
use super::attached::{self, Services};
use super::error::SessionError;
use super::framing::{self, FramingError, Reader, MAX_DOCUMENT};
use super::operation::Owner;
use crate::error::{Error, Result};
use crate::model::VmId;
use crate::mutex::Mutex;

/// Clients served at once. One more takes the place of a client that asks nothing; it waits only while all are answered.
const MAX_CLIENTS: usize = 256;
/// A client that came or asked so recently keeps its place.
const GRACE: Duration = Duration::from_secs(1);
/// How long a client may stall in the middle of a message, either way, and the pace that it must keep otherwise.
const STALL: Duration = Duration::from_secs(10);
const SLOWEST_BYTES_PER_S: usize = 256 * 1024;
/// How often to look whether a client that waits for an answer is still there.
const LOOK: Duration = Duration::from_millis(500);

/// Serves until dropped; its clients then read end-of-file.
pub struct Broker {
    task: AbortHandle,
    services: Arc<Services>,
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Broker {
    /// Binds the socket and serves it.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn serve(vm_id: VmId, socket: &Path, agent: Arc<Agent>, deadline: Duration) -> Result<Self> {
        let failed = |error: std::io::Error| Error::host("bind", socket.display(), error);
        let listener = UnixListener::bind(socket).map_err(failed)?;
        // Whatever the umask left of it. The folder is this user's alone: the name is the socket's.
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let services = Arc::new(Services::new(vm_id, agent, deadline));
        let task = tokio::spawn(accept(socket.to_owned(), listener, services.clone())).abort_handle();
        Ok(Self { task, services })
    }

    /// Names who does what attached clients ask of the VM's owner; until then they wait.
    pub fn set_owner(&self, owner: Arc<dyn Owner>) {
        self.services.set_owner(owner);
    }
}

/// When a client was last heard of, and whether its place may be given to another one.
#[derive(Debug)]
struct Activity {
    /// It has sent a whole message.
    has_asked: bool,
    /// Its question is being answered.
    is_answered: bool,
    since: Instant,
}

#[derive(Debug, Clone)]
pub(super) struct Place(Arc<Mutex<Activity>>);

impl Place {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Activity { has_asked: false, is_answered: false, since: Instant::now() })))
    }

    fn heard(&self) {
        self.0.lock().since = Instant::now();
    }

    pub fn asked(&self) {
        *self.0.lock() = Activity { has_asked: true, is_answered: true, since: Instant::now() };
    }

    pub fn answered(&self) {
        *self.0.lock() = Activity { has_asked: true, is_answered: false, since: Instant::now() };
    }

    /// The order in which idle clients give way: those that never asked first, then by how long they are silent.
    fn idle_rank(&self) -> Option<(bool, Instant)> {
        let activity = self.0.lock();
        let is_idle = !activity.is_answered && activity.since.elapsed() >= GRACE;
        is_idle.then_some((activity.has_asked, activity.since))
    }
}

/// The clients' tasks; dropping it ends them.
#[derive(Default)]
struct Clients {
    tasks: JoinSet<()>,
    places: Vec<(Place, AbortHandle)>,
}

impl Clients {
    fn remove_ended(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        self.places.retain(|(_, task)| !task.is_finished());
    }

    /// Waits for a free place; an idle client is disconnected for it.
    async fn make_room(&mut self, vm_id: &VmId) {
        self.remove_ended();
        while self.tasks.len() >= MAX_CLIENTS {
            let idle = self.places.iter().filter_map(|(place, task)| Some((place.idle_rank()?, task)));
            if let Some((_, task)) = idle.min_by_key(|(rank, _)| *rank) {
                log::debug!("{vm_id}: an idle client gives way to a new one");
                task.abort();
                self.tasks.join_next().await;
            } else {
                // All are busy or new; after the pause one may be idle.
                tokio::select! {
                    _ = self.tasks.join_next() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
            self.remove_ended();
        }
    }

    fn add(&mut self, place: Place, serve: impl Future<Output = ()> + Send + 'static) {
        let task = self.tasks.spawn(serve);
        self.places.push((place, task));
    }
}

async fn accept(socket: PathBuf, listener: UnixListener, services: Arc<Services>) {
    let vm_id = &services.vm_id;
    // Aborting this task drops them all.
    let mut clients = Clients::default();
    let uid = nix::unistd::geteuid().as_raw();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match stream.peer_cred() {
                Ok(peer) if peer.uid() == uid || peer.uid() == 0 => {
                    clients.make_room(vm_id).await;
                    let place = Place::new();
                    clients.add(place.clone(), serve(services.clone(), stream, place));
                }
                Ok(peer) => log::warn!("{vm_id}: a client with uid {} was refused", peer.uid()),
                Err(error) => log::warn!("{vm_id}: a client without credentials was refused: {error}"),
            },
            Err(error) => {
                log::warn!("{vm_id}: accept on {}: {error}", socket.display());
                // Out of descriptors, most likely: it would fail again at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// How long a client may take over so many bytes. One that stalls is cut off: what is held for it is given back.
pub(super) fn patience_for(bytes: usize) -> Duration {
    STALL + Duration::from_secs((bytes / SLOWEST_BYTES_PER_S) as u64)
}

/// How a conversation of the 4-byte framing ended.
enum End {
    HungUp,
    /// It goes on by the richer protocol; this came after the wish to.
    Attached(Vec<u8>),
}

async fn serve(services: Arc<Services>, mut stream: UnixStream, place: Place) {
    let ended = match converse(&services, &mut stream, &place).await {
        Ok(End::HungUp) => return,
        Ok(End::Attached(rest)) => attached::serve(services.clone(), stream, &rest, &place).await,
        Err(reason) => reason,
    };
    log::debug!("{}: a client went away: {ended}", services.vm_id);
}

/// Whether a client asks for the richer protocol: by the first of its messages, or never.
fn attaches(message: &Value) -> Option<bool> {
    (message["type"] == "attach").then(|| message["version"] == VERSION)
}

/// One question after the other, so that the answers come in their order. Meanwhile up to one document's worth of further
/// questions is read, so that a client may ask ahead without reading.
async fn converse(
    services: &Services,
    stream: &mut UnixStream,
    place: &Place,
) -> std::result::Result<End, SessionError> {
    let Services { vm_id, agent, deadline, .. } = services;
    let (mut reading, mut writing) = stream.split();
    let mut reader = Reader::default();
    for number in 0u64.. {
        if reader.is_empty() {
            // A client may be silent for as long as nobody wants its place, only not in the middle of a message.
            reading.readable().await?;
            place.heard();
        }
        let message = tokio::time::timeout(patience_for(MAX_DOCUMENT), reader.next(&mut reading)).await;
        let message = message.map_err(|_| SessionError::Stalled)?;
        place.asked();
        let first = (number == 0).then_some(&message).and_then(|message| message.as_ref().ok()?.as_ref());
        let wish = first.and_then(attaches);
        let (answer, last) = match message {
            Ok(Some(_)) if wish == Some(true) => (json!({"type": "attached", "version": VERSION}), false),
            Ok(Some(_)) if wish == Some(false) => {
                let reason = format!("this process attaches clients of version {VERSION} alone");
                (refusal("not_supported", &reason), false)
            }
            Ok(Some(message)) => {
                let answered = async {
                    tokio::select! {
                        biased;
                        answer = answer(vm_id, agent, message, *deadline) => Some(answer),
                        // Dropping the question cancels it in the guest.
                        () = hung_up(&writing) => None,
                    }
                };
                let answer = while_reading(&mut reader, &mut reading, answered).await;
                (answer.ok_or(SessionError::HungUp)?, false)
            }
            Ok(None) => return Ok(End::HungUp),
            Err(error @ FramingError::NotJson(_)) => (refusal("bad_message", &error.to_string()), false),
            Err(error @ FramingError::TooLong(_)) => (refusal("message_too_large", &error.to_string()), true),
            Err(FramingError::Io(error)) => return Err(error.into()),
        };
        let bytes = framing::encode(&answer)
            .or_else(|error| framing::encode(&refusal("message_too_large", &error.to_string())))?;
        drop(answer);
        let written = tokio::time::timeout(patience_for(bytes.len()), writing.write_all(&bytes));
        let written = while_reading(&mut reader, &mut reading, written).await;
        written.map_err(|_| SessionError::Deaf)??;
        if last {
            return Ok(End::HungUp);
        }
        place.answered();
        if wish == Some(true) {
            return Ok(End::Attached(reader.into_rest()));
        }
    }
    Ok(End::HungUp)
}

/// Does `work` and reads ahead meanwhile.
async fn while_reading<T>(reader: &mut Reader, stream: &mut ReadHalf<'_>, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let mut at_end = false;
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            // What went wrong with the stream shows when the next message is wanted.
            more = reader.read_ahead(stream), if !at_end && !reader.is_full() => at_end = !matches!(more, Ok(true)),
        }
    }
}

/// Returns when the client has closed both directions; one that closed only its own still waits for its answer.
async fn hung_up(stream: &WriteHalf<'_>) {
    loop {
        tokio::time::sleep(LOOK).await;
        match stream.ready(Interest::WRITABLE).await {
            Ok(ready) if !ready.is_write_closed() => {}
            _ => return,
        }
    }
}

fn refusal(code: &str, message: &str) -> Value {
    json!({"type": "response", "status": "error", "error": {"code": code, "message": message}})
}

fn failed(error: &Error) -> Value {
    let mut answer = refusal(error.code(), &error.to_string());
    answer["error"]["details"] = error.details();
    answer
}

/// Why a message is no command. Clients of before know these words: tests/golden/broker.framing.
#[derive(Debug, thiserror::Error)]
pub enum BadMessage {
    #[error("type must be \"ping\" or \"command\", not {0:?}")]
    Kind(String),
    #[error("a command needs \"command\" (or \"action\"): its name")]
    Nameless,
    #[error("the command's name must be a string, not {0}")]
    Name(Value),
    #[error("\"params\" (or \"data\") must be an object, not {0}")]
    Params(Value),
}

/// A client's message as the agent's action and parameters.
///
/// # Errors
/// What the message lacks.
pub fn parse(message: &Map<String, Value>) -> std::result::Result<(String, Value), BadMessage> {
    let kind = message.get("type").and_then(Value::as_str).unwrap_or("nothing");
    if kind == "ping" {
        return Ok(("ping".into(), Value::Null));
    }
    if kind != "command" {
        return Err(BadMessage::Kind(kind.to_owned()));
    }
    let name = message.get("command").or_else(|| message.get("action")).ok_or(BadMessage::Nameless)?;
    let name = name.as_str().ok_or_else(|| BadMessage::Name(name.clone()))?;
    let params = message.get("params").or_else(|| message.get("data")).cloned().unwrap_or(Value::Null);
    if !params.is_object() && !params.is_null() {
        return Err(BadMessage::Params(params));
    }
    Ok((name.to_owned(), params))
}

async fn answer(vm_id: &VmId, agent: &Agent, message: Value, deadline: Duration) -> Value {
    let Value::Object(message) = message else { return refusal("bad_message", "a message must be a JSON object") };
    let mut answer = match parse(&message) {
        Err(error) => refusal("bad_message", &error.to_string()),
        Ok((action, params)) => match ask(agent, &action, params, deadline).await {
            Ok(Response::Ok { .. }) if message.get("type") == Some(&json!("ping")) => json!({"type": "pong"}),
            Ok(Response::Ok { result }) => json!({"type": "response", "status": "ok", "result": result}),
            Ok(Response::Error { error }) => json!({"type": "response", "status": "error", "error": error}),
            // One of the pool is known by its first name further down.
            Err(error) => failed(&error.of(vm_id)),
        },
    };
    // Clients that number their messages get the number back.
    if let (Some(id), Value::Object(answer)) = (message.get("id"), &mut answer) {
        answer.insert("id".into(), id.clone());
    }
    answer
}

async fn ask(agent: &Agent, action: &str, params: Value, deadline: Duration) -> Result<Response> {
    let patience = patience(&params, deadline);
    agent.request(action, params, patience).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(message: Value) -> std::result::Result<(String, Value), BadMessage> {
        parse(message.as_object().unwrap())
    }

    #[test]
    fn test_idle_rank_those_that_never_asked_give_way_first_and_busy_or_new_ones_never() {
        let silent_since = |has_asked, seconds| {
            let since = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            Place(Arc::new(Mutex::new(Activity { has_asked, is_answered: false, since })))
        };
        let places = [silent_since(true, 900), silent_since(false, 5), silent_since(false, 50), silent_since(true, 3)];
        let mut order: Vec<usize> = (0..places.len()).collect();
        order.sort_by_key(|index| places[*index].idle_rank().unwrap());
        assert_eq!(order, [2, 1, 0, 3]);
        assert_eq!(Place::new().idle_rank(), None);
        places[0].asked();
        assert_eq!(places[0].idle_rank(), None);
    }

    #[test]
    fn test_parse_both_forms_of_a_command_mean_the_same() {
        let expected = ("exec".to_owned(), json!({"program": "ls"}));
        let today = json!({"type": "command", "command": "exec", "params": {"program": "ls"}});
        assert_eq!(parsed(today).unwrap(), expected);
        assert_eq!(parsed(json!({"type": "command", "action": "exec", "data": {"program": "ls"}})).unwrap(), expected);
    }

    #[test]
    fn test_parse_malformed_says_what() {
        for (message, expected) in [
            (json!({}), "type must be"),
            (json!({"type": "shout"}), "\"shout\""),
            (json!({"type": "command"}), "its name"),
            (json!({"type": "command", "command": 3}), "not 3"),
            (json!({"type": "command", "command": "x", "params": [1]}), "must be an object"),
        ] {
            assert!(parsed(message).unwrap_err().to_string().contains(expected));
        }
    }
}
