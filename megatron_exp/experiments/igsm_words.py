"""The worlds of the word problems: four hierarchies of four categories, and the names of the things in them.

A category has five lists of twenty names, each list four nouns with five adjectives. Nouns belong to one category each, so a name says what
it is; adjectives may recur. The words are our own.
"""

from functools import cache
from typing import NamedTuple

_listed = str.split

NAMES_PER_LIST = 20

_HIERARCHIES = (
    (
        (
            "Town",
            "quiet northern walled upper sunny",
            "Hamlet Borough Parish Quarter Suburb Village Colony Settlement Outpost Precinct "
            "Commune Ward Estate Terrace Bastion Township Enclave Barony Canton Hundred",
        ),
        (
            "Workshop",
            "smoky narrow busy vaulted timbered",
            "Forge Smithy Pottery Tannery Sawmill Brewery Foundry Bindery Weavery Cooperage "
            "Chandlery Glassworks Printery Joinery Ropery Brickworks Dyehouse Mint Bakehouse Cobblery",
        ),
        (
            "Cabinet",
            "oaken tall locked lacquered corner",
            "Cupboard Sideboard Wardrobe Drawer Locker Bureau Credenza Chest Coffer Hutch "
            "Armoire Bookcase Shelf Rack Casket Trunk Strongbox Larder Pantry Dresser",
        ),
        (
            "Tool",
            "sharp rusty brass forged spare",
            "Hammer Chisel Pincer Rasp Mallet Awl Gimlet Spanner Hacksaw Trowel Anvil Bellows Ladle "
            "Mandrel Punch Scraper Clamp Vise Auger Plane",
        ),
    ),
    (
        (
            "Harbour",
            "foggy southern deep old stony",
            "Cove Bay Inlet Quay Marina Dockyard Roadstead Estuary Fjord Lagoon Wharf Jetty Pier "
            "Haven Sound Strait Anchorage Mooring Slipway Basin",
        ),
        (
            "Ship",
            "swift painted sturdy twin-masted grey",
            "Schooner Frigate Barge Trawler Ketch Clipper Galleon Ferry Tugboat Cutter Sloop "
            "Brigantine Dhow Junk Caravel Corvette Yawl Lugger Pinnace Freighter",
        ),
        (
            "Container",
            "sealed woven dented heavy labelled",
            "Crate Barrel Keg Sack Hamper Basket Canister Bale Tub Cask Jar Flask Parcel Carton Bundle Urn Demijohn Pouch Satchel Tin",
        ),
        (
            "Cargo",
            "ripe dried golden salted rare",
            "Apricot Walnut Lentil Fig Almond Quince Raisin Chestnut Olive Date Peppercorn Clove Plum "
            "Hazelnut Barleycorn Nutmeg Cranberry Pistachio Chickpea Mulberry",
        ),
    ),
    (
        (
            "Festival",
            "spring royal annual lively winter",
            "Carnival Jubilee Fair Gala Pageant Revel Parade Fiesta Banquet Harvest Solstice "
            "Regatta Tournament Masquerade Procession Kermis Rodeo Exposition Bazaar Wassail",
        ),
        (
            "Stage",
            "round lantern-lit raised garden marble",
            "Pavilion Bandstand Theatre Rotunda Amphitheatre Gallery Balcony Platform Arena "
            "Marquee Auditorium Podium Ballroom Cloister Courtyard Gazebo Loggia Portico Scaffold Playhouse",
        ),
        (
            "Ensemble",
            "travelling famous youthful masked local",
            "Quartet Choir Orchestra Trio Troupe Sextet Octet Duo Chorus Quintet Consort "
            "Company Septet Band Circus Glee Nonet Guild Academy Fellowship",
        ),
        (
            "Instrument",
            "silver tuned wooden antique humming",
            "Violin Cello Trumpet Clarinet Lute Zither Oboe Harp Tambourine Bassoon Flute "
            "Mandolin Cornet Dulcimer Piccolo Accordion Bagpipe Celesta Viola Marimba",
        ),
    ),
    (
        (
            "Valley",
            "green hidden windy broad misty",
            "Glen Dale Ravine Canyon Gorge Hollow Dell Vale Coombe Strath Gully Lowland Floodplain "
            "Saddle Plateau Moor Heath Steppe Prairie Fen",
        ),
        (
            "Grove",
            "shady fragrant ancient birch wild",
            "Orchard Thicket Copse Spinney Coppice Arboretum Woodlot Plantation Hedge Brake "
            "Clearing Nursery Meadow Vineyard Park Jungle Brushwood Forest Glade Pinery",
        ),
        (
            "Nest",
            "mossy warm lofty round abandoned",
            "Burrow Hive Lair Den Warren Aerie Anthill Roost Cocoon Web Eyrie Sett Lodge Holt Drey Form Earth Perch Tunnel Dovecote",
        ),
        (
            "Creature",
            "spotted shy striped young nimble",
            "Badger Sparrow Weasel Hedgehog Otter Falcon Squirrel Marten Toad Beetle Lizard Dormouse "
            "Heron Kestrel Stoat Vole Magpie Newt Lynx Cricket",
        ),
    ),
)
"""Of each hierarchy the categories from the largest thing to the smallest: (category, five adjectives, twenty nouns)."""

NUM_LAYERS = 4


class Category(NamedTuple):
    """name: of the category. lists: five lists of twenty names."""

    name: str
    lists: tuple[tuple[str, ...], ...]


@cache
def hierarchies() -> tuple[tuple[Category, ...], ...]:
    """The four hierarchies, each four categories from the outermost inwards."""
    return tuple(tuple(_category(*words) for words in hierarchy) for hierarchy in _HIERARCHIES)


@cache
def category_of() -> dict[str, str]:
    """{name of a thing: its category}, over all worlds."""
    return {name: category.name for hierarchy in hierarchies() for category in hierarchy for names in category.lists for name in names}


@cache
def layer_of() -> dict[str, tuple[int, int]]:
    """{category: (hierarchy, layer)}."""
    return {category.name: (number, layer) for number, hierarchy in enumerate(hierarchies()) for layer, category in enumerate(hierarchy)}


def _category(name: str, adjectives: str, nouns: str) -> Category:
    names, first = _listed(nouns), [word.capitalize() for word in _listed(adjectives)]
    assert len(names) == NAMES_PER_LIST and len(first) == 5, name
    lists = [tuple(f"{adjective} {noun}" for noun in names[start : start + 4] for adjective in first) for start in range(0, len(names), 4)]
    return Category(name, tuple(lists))
