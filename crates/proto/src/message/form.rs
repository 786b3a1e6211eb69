//! How control messages are written and read: each has but one form.

use crossdock_transport::{Access, GrantId, LaneAddress, RemoteKey};

use super::{
    About, CancelWhy, Identity, MAX_LANES, Message, RailOffer, Refusal, RegionOffer, Released, RoleKind,
    RoomName, RoomOnWire,
};
use crate::fingerprint::{Difference, Fingerprint};
use crate::wire::{DecodeError, Reader, Writer};

const MAGIC: u16 = 0xcd0c;

impl Message {
    /// Appends the message, as one frame's content, to `out`.
    pub fn encode(&self, from: Identity, out: &mut Vec<u8>) {
        let mut w = Writer(out);
        w.u16(MAGIC);
        w.u16(self.kind());
        w.u64(from.node);
        w.u64(from.incarnation);
        match self {
            Message::Hello { version_min, version_max, about } => {
                w.u16(*version_min);
                w.u16(*version_max);
                put_about(&mut w, about);
            }
            Message::Welcome { version, about, proof } => {
                w.u16(*version);
                put_about(&mut w, about);
                w.raw(proof);
            }
            Message::Prove { proof } => w.raw(proof),
            Message::Refuse { refusal } => put_refusal(&mut w, refusal),
            Message::Setup { lanes, regions, app, held } => {
                w.u32(lanes.len() as u32);
                for (slot, address) in lanes {
                    w.u8(*slot);
                    w.bytes(address.bytes());
                }
                w.u32(regions.len() as u32);
                for region in regions {
                    w.u32(region.region);
                    w.u64(region.bytes);
                    w.u32(region.keys.len() as u32);
                    for (rail, key) in &region.keys {
                        w.u8(*rail);
                        w.bytes(key.bytes());
                    }
                }
                w.bytes(app);
                w.u32(held.len() as u32);
                held.iter().for_each(|grant| w.u32(grant.bits()));
            }
            Message::Ready | Message::Goodbye | Message::Restart => {}
            Message::Ping { stamp } | Message::Pong { stamp } => w.u64(*stamp),
            Message::LaneLost { slot } | Message::LaneReady { slot } => w.u8(*slot),
            Message::LaneOffer { slot, address } | Message::LaneAnswer { slot, address } => {
                w.u8(*slot);
                w.bytes(address.bytes());
            }
            Message::Want { room, duration_ns, params } => {
                put_room(&mut w, *room);
                w.u64(*duration_ns);
                w.bytes(params);
            }
            Message::Grant { room, access, attempt, grant, duration_ns, params, pages } => {
                put_room(&mut w, *room);
                w.u8(matches!(access, Access::Write) as u8);
                w.u32(*attempt);
                w.u32(grant.bits());
                w.u64(*duration_ns);
                w.bytes(params);
                w.ids(pages);
            }
            Message::Regrant { room, attempt, grant } => {
                put_room(&mut w, *room);
                w.u32(*attempt);
                w.u32(grant.bits());
            }
            Message::Finish { room, attempt, arrivals, aux } => {
                put_room(&mut w, *room);
                w.u32(*attempt);
                w.u32s(arrivals);
                w.bytes(aux);
            }
            Message::Delivered { room } => put_room(&mut w, *room),
            Message::Cancel { room, from, why } => {
                put_room(&mut w, *room);
                w.u8(*from as u8);
                w.u8(*why as u8);
            }
            Message::Release { released, delivered } => {
                w.u8(*delivered as u8);
                w.u32(released.len() as u32);
                for one in released {
                    w.u32(one.grant.bits());
                    w.u16(one.down_lanes);
                }
            }
        }
    }

    /// Reads one frame's content. A message has but one form: what is read here, encodes to the same bytes.
    pub fn decode(frame: &[u8]) -> Result<(Identity, Message), DecodeError> {
        let mut r = Reader(frame);
        let magic = r.u16("magic")?;
        if magic != MAGIC {
            return Err(DecodeError::BadValue { field: "magic", value: magic.into() });
        }
        let kind = r.u16("kind")?;
        let from = Identity { node: r.u64("node")?, incarnation: r.u64("incarnation")? };
        let message = match kind {
            1 => Message::Hello {
                version_min: r.u16("version_min")?,
                version_max: r.u16("version_max")?,
                about: take_about(&mut r)?,
            },
            2 => Message::Welcome {
                version: r.u16("version")?,
                about: take_about(&mut r)?,
                proof: r.array("proof")?,
            },
            3 => Message::Prove { proof: r.array("proof")? },
            4 => Message::Refuse { refusal: take_refusal(&mut r)? },
            5 => Message::Setup {
                lanes: r.list(5, "lanes", |r| {
                    let slot = r.u8("slot")?;
                    if usize::from(slot) >= MAX_LANES {
                        return Err(DecodeError::BadValue { field: "slot", value: slot.into() });
                    }
                    Ok((slot, take_address(r)?))
                })?,
                regions: r.list(16, "regions", |r| {
                    Ok(RegionOffer {
                        region: r.u32("region")?,
                        bytes: r.u64("region bytes")?,
                        keys: r.list(5, "keys", |r| {
                            let rail = r.u8("rail")?;
                            let key = RemoteKey::new(&r.bytes("key")?)
                                .map_err(|_| DecodeError::BadValue { field: "key", value: 0 })?;
                            Ok((rail, key))
                        })?,
                    })
                })?,
                app: r.bytes("app")?,
                held: r.list(4, "held", take_grant)?,
            },
            6 => Message::Ready,
            7 => Message::Goodbye,
            8 => Message::Restart,
            9 => Message::Ping { stamp: r.u64("stamp")? },
            10 => Message::Pong { stamp: r.u64("stamp")? },
            11 => Message::LaneLost { slot: r.u8("slot")? },
            12 => Message::Want {
                room: take_room(&mut r)?,
                duration_ns: r.u64("duration")?,
                params: r.bytes("params")?,
            },
            13 => Message::Grant {
                room: take_room(&mut r)?,
                access: if r.flag("access")? { Access::Write } else { Access::Read },
                attempt: r.u32("attempt")?,
                grant: take_grant(&mut r)?,
                duration_ns: r.u64("duration")?,
                params: r.bytes("params")?,
                pages: r.ids("pages")?,
            },
            14 => Message::Regrant {
                room: take_room(&mut r)?,
                attempt: r.u32("attempt")?,
                grant: take_grant(&mut r)?,
            },
            15 => Message::Finish {
                room: take_room(&mut r)?,
                attempt: r.u32("attempt")?,
                arrivals: r.u32s("arrivals")?,
                aux: r.bytes("aux")?,
            },
            16 => Message::Delivered { room: take_room(&mut r)? },
            17 => {
                Message::Cancel { room: take_room(&mut r)?, from: take_role(&mut r)?, why: take_why(&mut r)? }
            }
            18 => Message::Release {
                delivered: r.flag("delivered")?,
                released: r.list(6, "released", |r| {
                    Ok(Released { grant: take_grant(r)?, down_lanes: r.u16("down_lanes")? })
                })?,
            },
            19 => Message::LaneOffer { slot: r.u8("slot")?, address: take_address(&mut r)? },
            20 => Message::LaneAnswer { slot: r.u8("slot")?, address: take_address(&mut r)? },
            21 => Message::LaneReady { slot: r.u8("slot")? },
            value => {
                return Err(DecodeError::BadValue { field: "kind", value: value.into() });
            }
        };
        r.end()?;
        Ok((from, message))
    }

    fn kind(&self) -> u16 {
        match self {
            Message::Hello { .. } => 1,
            Message::Welcome { .. } => 2,
            Message::Prove { .. } => 3,
            Message::Refuse { .. } => 4,
            Message::Setup { .. } => 5,
            Message::Ready => 6,
            Message::Goodbye => 7,
            Message::Restart => 8,
            Message::Ping { .. } => 9,
            Message::Pong { .. } => 10,
            Message::LaneLost { .. } => 11,
            Message::Want { .. } => 12,
            Message::Grant { .. } => 13,
            Message::Regrant { .. } => 14,
            Message::Finish { .. } => 15,
            Message::Delivered { .. } => 16,
            Message::Cancel { .. } => 17,
            Message::Release { .. } => 18,
            Message::LaneOffer { .. } => 19,
            Message::LaneAnswer { .. } => 20,
            Message::LaneReady { .. } => 21,
        }
    }
}

fn put_room(w: &mut Writer<'_>, room: RoomOnWire) {
    w.u64(room.name.room);
    w.u32(room.name.use_count);
    w.u32(room.name.share);
    w.u32(room.serial);
}

fn take_room(r: &mut Reader<'_>) -> Result<RoomOnWire, DecodeError> {
    let name = RoomName { room: r.u64("room")?, use_count: r.u32("use count")?, share: r.u32("share")? };
    Ok(RoomOnWire { name, serial: r.u32("serial")? })
}

fn take_address(r: &mut Reader<'_>) -> Result<LaneAddress, DecodeError> {
    LaneAddress::new(&r.bytes("lane address")?)
        .map_err(|_| DecodeError::BadValue { field: "lane address", value: 0 })
}

fn take_grant(r: &mut Reader<'_>) -> Result<GrantId, DecodeError> {
    let bits = r.u32("grant")?;
    if bits >> 30 != 0 {
        return Err(DecodeError::BadValue { field: "grant", value: bits.into() });
    }
    Ok(GrantId::from_bits(bits))
}

fn take_role(r: &mut Reader<'_>) -> Result<RoleKind, DecodeError> {
    use RoleKind::*;
    let value = r.u8("role")?;
    [Receiving, Sending, Fetching, Serving]
        .into_iter()
        .find(|role| *role as u8 == value)
        .ok_or(DecodeError::BadValue { field: "role", value: value.into() })
}

fn take_why(r: &mut Reader<'_>) -> Result<CancelWhy, DecodeError> {
    use CancelWhy::*;
    let value = r.u8("why")?;
    [Cancelled, Expired, Busy, Failed, Corrupt, Mismatch]
        .into_iter()
        .find(|why| *why as u8 == value)
        .ok_or(DecodeError::BadValue { field: "why", value: value.into() })
}

fn put_about(w: &mut Writer<'_>, about: &About) {
    w.text(&about.name);
    w.raw(&about.nonce);
    w.u8(about.auth as u8);
    w.u32(about.fingerprint.values().len() as u32);
    for (key, value) in about.fingerprint.values() {
        w.text(key);
        w.text(value);
    }
    w.u32(about.rails.len() as u32);
    for rail in &about.rails {
        w.text(&rail.kind);
        w.text(&rail.reach);
        w.u64(rail.bytes_per_second);
    }
    w.u8(about.lanes_per_rail);
    w.text(&about.pulse_address);
    w.u64(about.heartbeat_ns);
}

fn take_about(r: &mut Reader<'_>) -> Result<About, DecodeError> {
    Ok(About {
        name: r.text("name")?,
        nonce: r.array("nonce")?,
        auth: r.flag("auth")?,
        fingerprint: {
            let values = r.list(8, "fingerprint", |r| Ok((r.text("key")?, r.text("value")?)))?;
            let count = values.len() as u64;
            Fingerprint::from_wire(values)
                .ok_or(DecodeError::BadValue { field: "fingerprint", value: count })?
        },
        rails: r.list(16, "rails", |r| {
            Ok(RailOffer {
                kind: r.text("kind")?,
                reach: r.text("reach")?,
                bytes_per_second: r.u64("bytes per second")?,
            })
        })?,
        lanes_per_rail: r.u8("lanes per rail")?,
        pulse_address: r.text("pulse address")?,
        heartbeat_ns: r.u64("heartbeat")?,
    })
}

fn put_refusal(w: &mut Writer<'_>, refusal: &Refusal) {
    match refusal {
        Refusal::Version { here_min, here_max, there_min, there_max } => {
            w.u8(1);
            [here_min, here_max, there_min, there_max].into_iter().for_each(|v| w.u16(*v));
        }
        Refusal::NotAuthentic => w.u8(2),
        Refusal::AuthMismatch => w.u8(3),
        Refusal::Fingerprint(differences) => {
            w.u8(4);
            w.u32(differences.len() as u32);
            for difference in differences {
                w.text(&difference.key);
                for side in [&difference.ours, &difference.theirs] {
                    w.u8(side.is_some() as u8);
                    w.text(side.as_deref().unwrap_or(""));
                }
            }
        }
        Refusal::NoRail { here, there } => {
            w.u8(5);
            w.text(here);
            w.text(there);
        }
        Refusal::Busy => w.u8(6),
        Refusal::Duplicate => w.u8(7),
        Refusal::SameNode => w.u8(8),
    }
}

fn take_refusal(r: &mut Reader<'_>) -> Result<Refusal, DecodeError> {
    Ok(match r.u8("refusal")? {
        1 => Refusal::Version {
            here_min: r.u16("version")?,
            here_max: r.u16("version")?,
            there_min: r.u16("version")?,
            there_max: r.u16("version")?,
        },
        2 => Refusal::NotAuthentic,
        3 => Refusal::AuthMismatch,
        4 => Refusal::Fingerprint(r.list(14, "differences", |r| {
            let key = r.text("key")?;
            let mut side = || -> Result<Option<String>, DecodeError> {
                let stated = r.flag("stated")?;
                let text = r.text("value")?;
                match stated || text.is_empty() {
                    true => Ok(stated.then_some(text)),
                    false => Err(DecodeError::BadValue { field: "stated", value: 0 }),
                }
            };
            Ok(Difference { key, ours: side()?, theirs: side()? })
        })?),
        5 => Refusal::NoRail { here: r.text("here")?, there: r.text("there")? },
        6 => Refusal::Busy,
        7 => Refusal::Duplicate,
        8 => Refusal::SameNode,
        value => {
            return Err(DecodeError::BadValue { field: "refusal", value: value.into() });
        }
    })
}
